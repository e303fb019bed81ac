"""Comparing models: figures and intervals by hand, yardsticks, reports, the sweep."""

from __future__ import annotations

import csv
import json
import math
from decimal import Decimal

import pytest
import yaml

from helpers.commands import run, succeeded
from helpers.models import save_adapter
from helpers.paths import QUICKSTART, ROOT
from rpam_mergekit.errors import RpamError
from rpam_mergekit.evaluate import comparison_report as compare_report
from rpam_mergekit.evaluate.compare import (
    Model,
    QueryFigures,
    by_weight,
    compare_models,
)
from rpam_mergekit.evaluate.sweep import interpolation, parse_weights
from rpam_mergekit.evaluate.yardsticks import at_tokens, upper_hull
from rpam_mergekit.formats.samples import Response, SampledQuery, SampleWriter

DATA = ROOT.parent / "shared" / "data"


def figures(correct, tokens=10, thinking="none", finish="stop", **source):
    responses = [
        Response(
            text="", tokens=tokens, correct=bool(c), thinking=thinking, finish=finish
        )
        for c in (correct if isinstance(correct, (list, tuple)) else [correct])
    ]
    query = SampledQuery(
        index=0, question="", messages=(), source=source, responses=tuple(responses)
    )
    return QueryFigures.of(query)


def model(role, rows, dataset="d", name=None):
    queries = {(dataset, f"{n}?"): row for n, row in enumerate(rows)}
    return Model(name or role, role, queries)


def test_figures_of_two_queries_by_hand():
    """Of two queries, one right: a draw holds 0, 1 or 2 right ones (1/4, 1/2, 1/4)."""
    long = model("long", [figures(1, 30, "closed"), figures(1, 10, "wrong")])
    merged = model("merged", [figures(1, 5), figures(0, 25, "closed", "length")])
    rows = compare_models([long, merged]).rows["d"]
    accuracy = rows["merged"]["accuracy"]
    assert (accuracy.value, accuracy.low, accuracy.high) == (0.5, 0.0, 1.0)
    tokens = rows["merged"]["tokens"]
    assert (tokens.value, tokens.low, tokens.high) == (15, 5, 25)
    assert rows["merged"]["saved"].value == 1 - 15 / 20
    assert rows["merged"]["thinking"].value == 0.5
    assert rows["merged"]["closed"].value == 1
    assert rows["long"]["closed"].value == 0.5
    assert rows["merged"]["cut_off"].value == 0.5


def test_an_interval_is_that_of_the_mean():
    """64 of 100 right: 0.64 -+ 1.96 * sqrt(0.64 * 0.36 / 100) = 0.546 to 0.734."""
    merged = model("merged", [figures(n < 64) for n in range(100)])
    accuracy = compare_models([merged], draws=4000).rows["d"]["merged"]["accuracy"]
    assert accuracy.value == 0.64
    assert math.isclose(accuracy.low, 0.546, abs_tol=0.015)
    assert math.isclose(accuracy.high, 0.734, abs_tol=0.015)


def test_differences_are_paired():
    rows = [figures(n % 3 == 0, 10 + n) for n in range(60)]
    found = compare_models(
        [model("long", rows), model("short", rows), model("merged", rows)]
    )
    level, difference = found.against["long"]
    assert level.high - level.low > 0.15
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_the_same_seed_gives_the_same_intervals():
    merged = model("merged", [figures(n % 2, n * n) for n in range(30)])
    a, b, c = (compare_models([merged], seed=seed).rows for seed in (0, 0, 1))
    assert a == b
    assert a != c


def test_responses_count_within_their_query():
    merged = model("merged", [figures([1, 1, 0, 0]), figures([1])])
    assert compare_models([merged]).rows["d"]["merged"]["accuracy"].value == 0.75


def test_data_sets_count_the_same():
    merged = model("merged", [figures(1, 10)] * 9, "easy")
    merged.queries |= model("merged", [figures(0, 30)], "hard").queries
    found = compare_models([merged])
    assert list(found.rows) == ["easy", "hard", "all"]
    assert found.rows["all"]["merged"]["accuracy"].value == 0.5
    assert found.rows["all"]["merged"]["tokens"].value == 20
    assert found.medians["all"]["merged"] == 10


def test_only_common_queries_count():
    long = model("long", [figures(1), figures(1), figures(0)])
    merged = model("merged", [figures(1), figures(0)])
    found = compare_models([long, merged])
    assert found.queries == {"d": 2}
    assert found.dropped == 1
    assert found.rows["d"]["long"]["accuracy"].value == 1
    with pytest.raises(RpamError, match="share no query"):
        compare_models([long, model("merged", [figures(1)], "other")])


def test_unknown_tokens_stay_unknown():
    long = model("long", [figures(1, None), figures(1, 7)])
    merged = model("merged", [figures(1, 5), figures(1, 5)])
    rows = compare_models([long, merged]).rows["d"]
    assert rows["long"]["tokens"].value is None
    assert rows["merged"]["saved"].value is None
    assert rows["merged"]["tokens"].value == 5


def test_a_curve_is_read_at_tokens():
    curve = [(30, 1.0), (20, 0.5), (10, 0.6)]
    assert at_tokens(curve, 25) == 0.75
    assert at_tokens(curve, 10) == 0.6
    assert at_tokens([(10, 0.2), (10, 0.8)], 10) == 0.8
    assert math.isnan(at_tokens(curve, 31))
    # The curve may come by twice: the better pass counts.
    assert at_tokens([(0, 0.0), (10, 1.0), (0, 0.5)], 5) == 0.75


def test_the_hull_is_random_mixing():
    assert upper_hull([(30, 1.0), (20, 0.5), (10, 0.6)]) == [(10, 0.6), (30, 1.0)]
    assert upper_hull([(0, 0.0), (1, 0.9), (2, 1.0), (1, 0.5)]) == [
        (0, 0.0),
        (1, 0.9),
        (2, 1.0),
    ]


def experts():
    """Of four queries Long is right on all at 20, 20, 40, 40 tokens, Short on one."""
    long = model("long", [figures(1, t, level=t) for t in (20, 20, 40, 40)])
    short = model("short", [figures(c, 0, level=0) for c in (1, 0, 0, 0)])
    return long, short


def test_the_router_buys_what_is_cheapest_first():
    found = compare_models([*experts()])
    assert found.router == [(0, 0.25), (5, 0.5), (15, 0.75), (25, 1.0)]


def test_a_router_by_a_field_knows_only_that():
    found = compare_models([*experts()], by="level")
    assert found.router == [(0, 0.25), (10, 0.5), (30, 1.0)]
    assert list(found.strata) == ["20", "40"]
    assert found.strata["20"]["short"] == (0.5, 0.0, 0.0)
    with pytest.raises(RpamError, match="no query has a field 'lvel'"):
        compare_models([*experts()], by="lvel")


def test_the_merged_model_is_measured_at_its_own_tokens():
    long, short = experts()
    merged = model("merged", [figures(c, 15) for c in (1, 1, 0, 1)])
    half = model("sweep", [figures(c, 10) for c in (1, 0, 0, 0)], name="w0.5")
    found = compare_models([long, short, merged, half])
    assert found.curve == [(30, 1.0), (10, 0.25), (0, 0.25)]
    level, difference = found.against["sweep"]  # a quarter of the way from 10 to 30
    assert level.value == 0.25 + 0.75 / 4
    assert difference.value == 0.75 - level.value
    assert found.against["hull"][0].value == 0.25 + 0.75 / 2
    assert found.against["router"][0].value == 0.75


def test_a_sweep_is_in_the_order_of_its_weights():
    """A shell lists w0.05 before w0.samples.jsonl and that after w0.95."""
    listed = ["w0.05", "w0.5", "w0", "w1", "w-0.1"]
    models = [Model(name, "sweep") for name in listed]
    ordered = ["w-0.1", "w0", "w0.05", "w0.5", "w1"]
    assert [m.name for m in by_weight(models)] == ordered
    models[0].name = "half"
    assert [m.name for m in by_weight(models)] == ["half", *listed[1:]]


def test_groups_by_longs_tokens():
    found = compare_models([model("long", [figures(1, t) for t in range(1, 101)])])
    assert list(found.strata) == ["1 to 26", "26 to 50", "50 to 75", "75 to 100"]


def write(path, rows, **header):
    with SampleWriter(path, {"model": path.stem, **header}) as writer:
        for n, (correct, tokens) in enumerate(rows):
            response = Response(text="", tokens=tokens, correct=bool(correct))
            writer.append(
                SampledQuery(
                    index=n,
                    question=f"{n}?",
                    messages=({"role": "user", "content": f"{n}?"},),
                    source={"level": n % 2},
                    responses=(response,),
                )
            )
        writer.finish()
    return str(path)


@pytest.fixture
def files(tmp_path):
    return [
        write(tmp_path / "long.samples.jsonl", [(1, 30)] * 20),
        write(tmp_path / "short.samples.jsonl", [(n % 2, 2) for n in range(20)]),
        write(tmp_path / "merged.samples.jsonl", [(n > 1, 9 + n) for n in range(20)]),
        write(tmp_path / "w0.5.samples.jsonl", [(n % 4, 12) for n in range(20)]),
    ]


def test_the_report_is_written(tmp_path, files):
    out = tmp_path / "report"
    command = ["mergekit-rpam", "compare", *files, "--out", str(out), "--by", "level"]
    process = run(command)
    succeeded(process)
    assert process.stdout.startswith((out / "compare.txt").read_text().rstrip())
    assert "90.0 % (75.0 %, 100.0 %)" in process.stdout
    assert "w0.5" not in process.stdout
    rows = list(csv.DictReader((out / "compare.csv").open()))
    by = {(r["model"], r["figure"]): r for r in rows}
    assert by["merged", "accuracy"]["value"] == "0.9"
    assert by["w0.5", "tokens"]["role"] == "sweep"
    assert float(by["hull", "merged_less_it"]["value"]) > 0
    card = (out / "compare.md").read_text()
    assert "| long | 100.0 % (100.0 %, 100.0 %) |" in card
    assert len({line.count("|") for line in card.split("\n\n")[1].splitlines()}) == 1
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_folders_hold_a_file_per_data_set(tmp_path):
    folders = []
    for role in ("long", "short"):
        folder = tmp_path / role
        folder.mkdir()
        folders.append(str(folder))
        for name in ("easy", "hard"):
            rows = [(name == "easy" or role == "long", 9)] * 6
            write(folder / f"{name}.jsonl", rows, dataset={"name": name})
    out = str(tmp_path / "report")
    process = run(["mergekit-rpam", "compare", *folders, "--out", out])
    succeeded(process)
    assert "queries: easy (6), hard (6)." in process.stdout
    assert "all:" in process.stdout
    assert "50.0 % (50.0 %, 50.0 %)" in process.stdout


def test_what_cannot_be_compared_is_refused(tmp_path, files):
    out = str(tmp_path / "report")
    unfinished = tmp_path / "unfinished.samples.jsonl"
    lines = (tmp_path / "merged.samples.jsonl").read_text().splitlines(keepends=True)
    unfinished.write_text("".join(lines[:-1]))
    command = ["mergekit-rpam", "compare", *files[:2], str(unfinished), "--out", out]
    process = run(command)
    assert process.returncode == 1
    assert "has not finished (20 queries so far)" in process.stderr
    assert not (tmp_path / "report").exists()
    succeeded(run([*command, "--partial"]))
    process = run([*command[:2], files[0], "--out", out, "--by", "levels"])
    assert process.returncode == 1
    assert "--by: no query has a field 'levels'. Known: level." in process.stderr


@pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")
def test_real_responses_of_a_merged_reasoner(tmp_path):
    """75.6 %, and 58 of 90 responses close their thinking by the right token."""
    source = tmp_path / "aime.jsonl"
    with open(source, "w") as file:
        for line in (DATA / "outputs" / "aime24.jsonl").read_text().splitlines():
            row = json.loads(line)
            record = {"question": row["question"], "answer": row["gt"]}
            file.write(json.dumps({**record, "responses": row["code"]}) + "\n")
    out = str(tmp_path / "report")
    command = ["mergekit-rpam", "compare", str(source), "--opened-by-prompt"]
    process = run([*command, "--out", out])
    succeeded(process)
    row = next(line for line in process.stdout.splitlines() if line.startswith("aime"))
    assert " 75.6 % (" in row
    assert " 64.4 % (" in row


def test_weights_are_exact():
    assert parse_weights("0:1:0.1")[3] == Decimal("0.3")
    assert len(parse_weights("0:1:0.05")) == 21
    assert parse_weights("0.4,0.3,0.4") == [Decimal("0.3"), Decimal("0.4")]
    for bad in ("0:1", "1:0:0.1", "0:1:0", "a", "0:1:1e-9", "nan", ""):
        with pytest.raises(RpamError, match="expected"):
            parse_weights(bad)


def test_an_interpolation_keeps_the_dtypes():
    config = yaml.safe_load((QUICKSTART / "rpam.yml").read_text())
    assert interpolation(config, Decimal("0.30")) == {
        "merge_method": "task_arithmetic",
        "base_model": "examples/quickstart/long",
        "models": [
            {"model": "examples/quickstart/short", "parameters": {"weight": 0.3}}
        ],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    with pytest.raises(RpamError, match="one other model"):
        interpolation({"base_model": "a", "models": []}, Decimal(0))


def test_a_sweep_is_merged_sampled_and_gone_on_with(tmp_path):
    config = yaml.safe_load((QUICKSTART / "rpam.yml").read_text())
    config["base_model"] = str(QUICKSTART / "long")
    config["models"] = [{"model": str(QUICKSTART / "short")}]
    path = tmp_path / "rpam.yml"
    path.write_text(yaml.safe_dump(config))
    data = tmp_path / "q.jsonl"
    data.write_text('{"question": "7+5=", "answer": "2"}\n')
    out = tmp_path / "sweep"
    command = ["mergekit-rpam", "sweep", str(path), "--out", str(out)]
    options = ["--dataset", str(data), "-k", "2", "--max-tokens", "72"]
    process = run([*command, "--weights", "0,1", *options])
    succeeded(process)
    names = {p.name for p in out.iterdir() if not p.name.startswith(".")}
    assert names == {"w0.samples.jsonl", "w1.samples.jsonl", "sweep.json"}
    assert "rpam: " not in process.stderr
    before = (out / "w1.samples.jsonl").read_bytes()
    process = run([*command, "--weights", "0.5,1", "--keep", *options])
    succeeded(process)
    assert "w1.samples.jsonl is finished" in process.stderr
    assert (out / "w1.samples.jsonl").read_bytes() == before
    assert (out / "w0.5" / "model.safetensors").exists()
    files = [str(out / f"w{weight}.samples.jsonl") for weight in (0, 1)]
    report = str(tmp_path / "report")
    succeeded(run(["mergekit-rpam", "compare", *files, "--out", report]))

    for changed, expected in (
        (["-k", "3"], "sampling.samples: this sweep was made with 2, now it is 3."),
        (["--instruction", "Box it."], "dataset.instruction: this sweep was made"),
    ):
        process = run([*command, "--weights", "1", *options, *changed])
        assert process.returncode == 1
        assert expected in process.stderr
        assert "Sweeps are not mixed" in process.stderr
    config["out_dtype"] = "float32"
    path.write_text(yaml.safe_dump(config))
    process = run([*command, "--weights", "1", *options])
    assert process.returncode == 1
    assert "merge.out_dtype: this sweep was made with 'bfloat16'" in process.stderr
    assert (out / "w1.samples.jsonl").read_bytes() == before


def test_a_sweep_of_relative_folders_works_offline(tmp_path):
    """mergekit's model card would ask the Hub about a folder named `long`."""
    for name in ("long", "short"):
        (tmp_path / name).symlink_to(QUICKSTART / name)
    config = {
        "merge_method": "rpam",
        "base_model": "long",
        "models": [{"model": "short"}],
        "dtype": "float32",
    }
    (tmp_path / "rpam.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "q.jsonl").write_text('{"question": "7+5=", "answer": "2"}\n')
    command = ["mergekit-rpam", "sweep", "rpam.yml", "--out", "sweep"]
    options = ["--weights", "0.5", "--dataset", "q.jsonl", "-k", "1"]
    options += ["--max-tokens", "72"]
    process = run([*command, *options], tmp_path, HF_HUB_OFFLINE="1")
    succeeded(process)
    assert "Traceback" not in process.stderr
    assert (tmp_path / "sweep" / "w0.5.samples.jsonl").exists()


def test_a_sweep_takes_adapters(tmp_path):
    adapter = save_adapter(QUICKSTART / "long", tmp_path / "lora")
    config = {
        "merge_method": "rpam",
        "base_model": str(QUICKSTART / "long"),
        "models": [{"model": f"{QUICKSTART / 'long'}+{adapter}"}],
    }
    (tmp_path / "rpam.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "q.jsonl").write_text('{"question": "7+5=", "answer": "2"}\n')
    command = ["mergekit-rpam", "sweep", "rpam.yml", "--out", "sweep"]
    options = ["--weights", "0.5", "--dataset", "q.jsonl", "-k", "1"]
    options += ["--max-tokens", "8"]
    succeeded(run([*command, *options], tmp_path))
    save_adapter(QUICKSTART / "long", adapter, seed=1)
    process = run([*command, *options], tmp_path)
    assert process.returncode == 1
    assert "weights_digests" in process.stderr


def test_a_sweep_with_wrong_options_merges_nothing(tmp_path):
    config = str(QUICKSTART / "rpam.yml")
    out = tmp_path / "sweep"
    command = ["mergekit-rpam", "sweep", config, "--out", str(out), "--weights", "0.5"]
    for options, expected in (
        (["--dataset", "x", "--base-url", "y"], "--base-url: cannot be given"),
        (["--dataset", "x", "--max-token", "5"], "No such option"),
        ([], "Missing option '--dataset'"),
        (["--dataset", "nowhere.jsonl"], "--dataset: no file nowhere.jsonl"),
    ):
        process = run([*command, *options])
        assert process.returncode != 0
        assert expected in process.stderr
        assert "Traceback" not in process.stderr
    assert not out.exists()


def test_the_text_marks_what_is_not_defined():
    found = compare_models([model("merged", [figures(1, None)])])
    assert "  -" in compare_report.text(found)
