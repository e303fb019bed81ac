"""Every benchmark runs, shortened, and its tables say what it measured."""

from __future__ import annotations

import re

import pytest

from helpers.benchmarks import benchmark, number, tables


def test_speed_lets_ours_run_until_it_reaches_the_plain_end():
    process = benchmark("performance/speed", "--quick", "--ways", "element,tensor")
    trials, ratios = tables(process)
    assert "SHORTENED" in process.stdout
    by_name: dict[str, list] = {}
    for row in trials:
        by_name.setdefault(row[""], []).append(row)
    (start,) = by_name["one half everywhere"]
    for granularity in ("element", "tensor"):
        (plain,) = by_name[f"plain, {granularity}"]
        ours = by_name[f"ours, {granularity}"]
        assert number(plain["held-out objective"]) < number(start["held-out objective"])
        assert [row["reached"] for row in ours] == ["no"] * (len(ours) - 1) + ["yes"]
        for figure in ("held-out objective", "last layer"):
            assert number(ours[-1][figure]) <= number(plain[figure])
    assert [row["pairs"] for row in ratios] == ["1 of 1", "1 of 1"]


def test_prepass_memory_sees_the_pre_pass_and_the_whole_models():
    process = benchmark("performance/prepass_memory", "--quick")
    (rows,) = tables(process)
    assert [row["layers"] for row in rows] == ["2", "16"]
    # transformers maps the whole models' weights: theirs is the second such column.
    assert number(rows[1]["resident'"]) > number(rows[0]["resident'"])
    assert all(number(row["pre-pass: anonymous"]) > 0 for row in rows)
    assert re.search(r"the largest -?[\d.]+ % above the smallest", process.stdout)
    assert "from 16 layers on, resident, below both models whole:" in process.stdout


def test_prepass_time_grows_and_is_drawn(tmp_path):
    plot = tmp_path / "time.png"
    process = benchmark("performance/prepass_time", "--quick", "--plot", str(plot))
    for rows in tables(process):
        sizes = [int(next(iter(row.values()))) for row in rows]
        assert sizes == sorted(sizes)
        assert len(sizes) == 3
    assert len(re.findall(r"R\^2 [\d.]+", process.stdout)) == 2
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_merge_time_compares_every_granularity_with_linear():
    (rows,) = tables(benchmark("performance/merge_time", "--quick"))
    names = ["linear, bf16", "linear, float32", "tensor", "low_rank", "element"]
    assert [row[""] for row in rows] == names
    assert number(rows[0]["times linear, bf16"]) == 1
    for row in rows[2:]:
        assert row["within"].startswith(("yes (", "NO ("))
        seconds = number(row["seconds, median (least, most)"])
        assert 0 < number(row["of which digests"]) < seconds


def test_compute_dtype_compares_time_and_gap():
    (rows,) = tables(benchmark("performance/compute_dtype", "--quick"))
    assert [row["pair"] for row in rows] == ["random-128"]
    for dtype in ("float32", "bfloat16"):
        assert number(rows[0][f"{dtype}: seconds"]) > 0
        assert 0 < number(rows[0][f"mean gap, {dtype}"]) < 1


def test_random_kills_leave_the_same_bytes():
    kills, phases = tables(benchmark("performance/random_kills", "--quick"))
    assert [row["files"] for row in kills] == ["identical"] * 4
    assert sum(int(row["times"]) for row in phases) == 4
    assert all(row["while"] for row in kills)


def test_full_size_without_a_gpu_says_so():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    process = benchmark("performance/full_size")
    assert process.returncode == 1
    assert process.stderr.startswith("No CUDA device here: nothing measured.")


def test_full_size_runs_on_the_cpu():
    options = ["--device", "cpu", "--shapes", "tiny", "--layers", "2"]
    options += ["--per-pattern", "2", "--epochs", "1"]
    options += ["--max-tokens", "256", "--plain-padded", "64"]
    ours, plain = tables(benchmark("performance/full_size", *options))
    assert [row[""] for row in ours] == ["tiny, prompt", "tiny, prompt+response"]
    tokens = [int(row["tokens"]) for row in ours]
    assert 0 < tokens[0] < tokens[1]
    for row in ours:
        # Of a CPU that is busy, or slower in bfloat16, it may be more than all.
        assert number(row["share of the bf16 matrix rate"]) > 0
        assert row["GPU peak, MiB"] == ""
    assert number(plain[0]["ratio"]) > 0


def test_the_profile_names_phases_and_operations():
    phases, operations = tables(benchmark("performance/profile_prepass", "--quick"))
    shares = [number(row["share of the time"]) for row in phases]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert phases[0]["phase"] == "solving"
    assert shares[0] == max(shares[:-1])
    assert any("mm" in row["operation"] for row in operations)


def test_cli_start_measures_every_command():
    from rpam_mergekit.cli.main import main

    process = benchmark("performance/cli_start", "--quick")
    (rows,) = tables(process)
    assert len(rows) == 2 + len(main.commands)
    assert number(rows[0]["times the import of click"]) == 1
    assert all(number(row["times the import of click"]) > 0 for row in rows)
    assert re.search(r"largest median ratio [\d.]+, target 4", process.stdout)


def test_startup_time_compares_starts_with_and_without_the_start_up_file():
    process = benchmark("performance/startup_time", "--pairs", "3")
    (rows,) = tables(process)
    assert [row["time"] for row in rows] == ["wall", "CPU"]
    for row in rows:
        assert number(row["with"]) > 0 < number(row["without"])
        number(row["difference"])  # of three starts, nothing can be said of it
