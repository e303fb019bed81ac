"""From two models to a merged one: sampling by server and in process, kills, faults."""

from __future__ import annotations

import contextlib
import json
import random
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import chains
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.commands import run, start, succeeded
from helpers.pages import shell_lines
from helpers.paths import QUICKSTART, SCRIPTS
from helpers.sampling import TASK, refused, sample, serving
from rpam_mergekit.formats.calibration import read_calibration
from rpam_mergekit.formats.samples import SampleReader
from rpam_mergekit.sampling.run import SamplingSettings

LONG, SHORT = str(QUICKSTART / "long"), str(QUICKSTART / "short")


@pytest.fixture(scope="module")
def server():
    """Serves the quickstart pair, without faults."""
    with serving("--model", f"long={LONG}", "--model", f"short={SHORT}") as server:
        yield server


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> str:
    """Queries of the quickstart's task, every difficulty equally frequent."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    command = ["python", str(QUICKSTART / "questions.py"), str(path)]
    succeeded(run([*command, "--queries", "160"]))
    return str(path)


def texts(path: Path) -> dict[int, list[str]]:
    return {q.index: [r.text for r in q.responses] for q in SampleReader(path)}


def test_from_sampling_to_a_merged_model(tmp_path, server, questions, mergekit_yaml):
    for model in ("long", "short"):
        out = tmp_path / f"{model}.samples.jsonl"
        process = sample(model, questions, out, "-k", "4", "--base-url", server.url)
        succeeded(process)
        assert "accuracy" in process.stdout
        reader = SampleReader(out)
        found = list(reader)
        assert reader.finished
        assert sorted(q.index for q in found) == list(range(160))
        assert {len(q.responses) for q in found} == {4}
        if model == "long":
            thinking = [r.thinking for q in found for r in q.responses]
            assert thinking.count("closed") > 0.95 * len(thinking)
            easy = next(q for q in found if q.index == 0)
            # <think>7+5=2</think>2 and the end token, by the server's count
            assert easy.responses[0].tokens == 9
    calibration = tmp_path / "calibration.jsonl"
    process = run(
        [
            "mergekit-rpam",
            "label",
            str(tmp_path / "long.samples.jsonl"),
            str(tmp_path / "short.samples.jsonl"),
            *("--out", str(calibration), "--by", "operations"),
            *("--plot", str(tmp_path / "labels.png")),
        ]
    )
    succeeded(process)
    shares = shares_by_operations(process.stdout)
    assert min(shares[d] for d in (1, 2, 3)) >= 0.9
    assert max(shares[d] for d in (6, 7, 8)) <= 0.4
    assert (tmp_path / "labels.png").exists()
    read_calibration(calibration)
    config = {
        "merge_method": "rpam",
        "base_model": LONG,
        "models": [{"model": SHORT}],
        "dtype": "float32",
        "parameters": {
            "calibration": str(calibration),
            "epochs": 1,
            "queries_per_pattern": 32,
        },
    }
    succeeded(mergekit_yaml(config))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(merged.model.layers[0].mlp.up_proj.weight).all()


def shares_by_operations(output: str) -> dict[int, float]:
    rows = [line.split() for line in output.splitlines()]
    return {
        int(row[0]): float(row[2].rstrip("%")) / 100
        for row in rows
        if len(row) == 3 and row[0].isdigit() and row[2].endswith("%")
    }


def test_every_fault_of_a_server_is_survived(tmp_path, server, questions):
    """20 % of the requests fail; each query is sampled once, as without faults."""
    options = ["-k", "4", "--limit", "120", "--timeout", "2"]
    out, plain = tmp_path / "out.jsonl", tmp_path / "plain.jsonl"
    with serving("--model", f"long={LONG}", "--faults", "0.2") as faulty:
        process = sample("long", questions, out, *options, "--base-url", faulty.url)
        counts = faulty.counts()
    succeeded(process)
    for fault in ("limited", "error", "cut", "torn", "stalled"):
        assert counts[fault] >= 5, counts
    assert counts["answered"] == 480
    assert "retries=" in process.stderr
    succeeded(sample("long", questions, plain, *options, "--base-url", server.url))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    indices = [line["index"] for line in lines if "index" in line]
    assert sorted(indices) == list(range(120))
    assert texts(out) == texts(plain)


def killed_at_random(command: list[str], out: Path, kills: int, longest: float) -> int:
    """Run and `kill -9` it `kills` times; return how many kills hit a live run."""
    rng = random.Random(0)
    hits = 0
    for _ in range(kills):
        process = start(command)
        before = out.stat().st_size if out.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if out.exists() and out.stat().st_size > before:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, longest))
        children = []
        with contextlib.suppress(psutil.NoSuchProcess):  # it had finished
            children = psutil.Process(process.pid).children(recursive=True)
        hits += process.poll() is None
        process.kill()
        process.communicate()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, "a killed run leaves no process behind"
    return hits


def test_ten_kills_change_nothing(tmp_path, questions):
    arguments = ["-k", "4", "--concurrency", "8", "--limit", "140"]
    out, plain = tmp_path / "out.jsonl", tmp_path / "plain.jsonl"
    with serving("--model", f"long={LONG}", "--delay", "0.15") as slow:
        arguments += ["--base-url", slow.url]
        command = ["mergekit-rpam", "sample", "long", "--dataset", questions]
        command += ["--out", str(out), *TASK, *arguments]
        assert killed_at_random(command, out, 10, 0.4) >= 8
        between = SampleReader(out)
        assert 0 < len(list(between)) < 140
        assert not between.finished
        process = sample("long", questions, out, *arguments)
        succeeded(process)
        assert "are left" in process.stderr
        succeeded(sample("long", questions, plain, *arguments))
    lines = [sorted(path.read_text().splitlines()) for path in (out, plain)]
    assert lines[0] == lines[1]


def test_a_killed_run_in_process_gives_the_same_bytes(tmp_path, questions):
    out, plain = tmp_path / "out.jsonl", tmp_path / "plain.jsonl"
    options = ["-k", "5", "--batch-size", "12", "--dtype", "float32"]
    options += ["--limit", "80"]
    command = ["mergekit-rpam", "sample", LONG, "--dataset", questions]
    command += ["--out", str(out), *TASK, *options]
    assert killed_at_random(command, out, 2, 0.5) >= 1
    succeeded(sample(LONG, questions, out, *options))
    succeeded(sample(LONG, questions, plain, *options))
    lines = [sorted(path.read_text().splitlines()) for path in (out, plain)]
    assert lines[0] == lines[1]


def test_responses_do_not_depend_on_the_batch(tmp_path, questions):
    """In float32; every response draws from a generator of its own."""
    found = []
    for size in ("7", "64"):
        out = tmp_path / f"{size}.jsonl"
        options = ["-k", "3", "--limit", "40", "--dtype", "float32"]
        succeeded(sample(LONG, questions, out, *options, "--batch-size", size))
        found.append(texts(out))
    assert found[0] == found[1]


def test_seeded_sampling_follows_the_distribution():
    from rpam_mergekit.sampling.local import SeededSampling

    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    settings = SamplingSettings(temperature=0.5, top_p=0.999, top_k=3)
    counts = torch.zeros(4)
    for seed in range(2000):
        noisy = SeededSampling(settings, [seed], torch.device("cpu"))
        counts[noisy(torch.zeros(1, 1, dtype=torch.long), logits).argmax()] += 1
    expected = torch.softmax(logits[0, :3] / 0.5, 0)
    assert counts[3] == 0
    assert (counts[:3] / 2000 - expected).abs().max() < 0.03


def test_a_generation_ends_when_its_run_is_stopped():
    from rpam_mergekit.grading.responses import Markers
    from rpam_mergekit.sampling.local import ModelOptions, TransformersBackend

    options = ModelOptions(device="cpu", dtype="float32")
    settings = SamplingSettings(max_tokens=72)
    backend = TransformersBackend(LONG, settings, options, Markers())
    prompt = list(backend.tokenizer("<|user|>7+5*3=<|end|><|assistant|>")["input_ids"])
    whole = backend._generate([prompt], [1])[0]
    backend._stopping.set()
    stopped = backend._generate([prompt], [1])[0]
    assert whole.tokens > 10
    assert (stopped.tokens, stopped.finish) == (1, "length")


def test_seeds_differ_by_run_query_and_response():
    settings = SamplingSettings(seed=0)
    seeds = {settings.seed_of(i, n) for i in range(100) for n in range(12)}
    assert len(seeds) == 1200
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert SamplingSettings(seed=1).seed_of(0, 0) not in seeds


def test_a_finished_run_can_be_extended_but_not_changed(tmp_path, server, questions):
    out = tmp_path / "out.jsonl"
    url = ["--base-url", server.url]
    succeeded(sample("long", questions, out, *url, "-k", "2", "--limit", "5"))
    before = out.read_bytes()
    refused(
        sample("long", questions, out, *url, "-k", "3", "--limit", "5"),
        "sampling.samples: the file was made with 2, this run has 3.",
    )
    refused(
        sample("long", questions, out, *url, "-k", "2", "--instruction", "Box it."),
        "dataset.instruction: the file was made with '', this run has 'Box it.'.",
        "dataset.digest",
    )
    assert out.read_bytes() == before
    succeeded(sample("long", questions, out, *url, "-k", "2", "--limit", "8"))
    assert sorted(texts(out)) == list(range(8))
    assert out.read_bytes().startswith(before)
    assert SampleReader(out).header == json.loads(before.splitlines()[0])


def test_an_unfinished_file_is_not_labelled(tmp_path, server, questions):
    url = ["--base-url", server.url]
    for model in ("long", "short"):
        out = tmp_path / f"{model}.jsonl"
        succeeded(sample(model, questions, out, *url, "-k", "1"))
    long = tmp_path / "long.jsonl"
    long.write_text("".join(long.read_text().splitlines(keepends=True)[:-1]))
    files = [str(tmp_path / f"{model}.jsonl") for model in ("long", "short")]
    command = ["mergekit-rpam", "label", *files, "--out", str(tmp_path / "c.jsonl")]
    refused(run(command), "has not finished (160 queries so far)", "--partial")
    succeeded(run([*command, "--partial"]))


def test_a_server_that_is_not_there(tmp_path, questions):
    process = sample(
        "long", questions, tmp_path / "o.jsonl", "--base-url", "http://127.0.0.1:9/v1"
    )
    refused(process, "--base-url: cannot reach http://127.0.0.1:9/v1/")
    assert not (tmp_path / "o.jsonl").exists()


def test_a_model_that_is_not_served(tmp_path, server, questions):
    process = sample("lnog", questions, tmp_path / "o.jsonl", "--base-url", server.url)
    refused(process, "does not serve 'lnog'. Did you mean 'long'?")


def test_a_wrong_key(tmp_path, questions):
    out = tmp_path / "out.jsonl"
    with serving("--model", "stub", "--stub", "7", "--key", "right") as server:
        url = ["--base-url", server.url, "--limit", "3", "-k", "1"]
        process = sample("stub", questions, out, *url, OPENAI_API_KEY="wrong")
        refused(process, "Incorrect API key", "OPENAI_API_KEY")
        succeeded(sample("stub", questions, out, *url, OPENAI_API_KEY="right"))


def test_queries_that_a_server_refuses_are_named_and_lose_no_other(tmp_path):
    data = tmp_path / "q.jsonl"
    rows = [
        {"question": f"{n}: {'long' if n % 5 == 4 else 'ok'}", "answer": "7"}
        for n in range(20)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    with serving("--model", "stub", "--stub", "7", "--refuse", "long") as server:
        url = ["--base-url", server.url, "-k", "2"]
        process = sample("stub", str(data), out, *url)
    refused(
        process,
        "query 4: the server refuses it",
        "maximum context is 8 tokens",
        "4 queries were refused and are not in the file",
    )
    reader = SampleReader(out)
    assert sorted(q.index for q in reader) == [n for n in range(20) if n % 5 != 4]
    assert not reader.finished
    with serving("--model", "stub", "--stub", "7") as server:
        succeeded(sample("stub", str(data), out, "--base-url", server.url, "-k", "2"))
    assert sorted(texts(out)) == list(range(20))


def test_a_server_that_refuses_everything_stops_the_run(tmp_path, questions):
    with serving("--model", "stub", "--stub", "7", "--refuse", "=") as server:
        url = ["--base-url", server.url, "-k", "1", "--concurrency", "2"]
        process = sample("stub", questions, tmp_path / "o.jsonl", *url)
        refused(process, "the server refused the first ")
        assert server.counts()["requests"] < 20


def test_a_server_that_stays_down_stops_the_run_and_loses_nothing(tmp_path, questions):
    out = tmp_path / "out.jsonl"
    with serving("--model", "stub", "--stub", "7") as server:
        url = ["--base-url", server.url, "-k", "1"]
        succeeded(sample("stub", questions, out, *url, "--limit", "5"))
    with serving("--model", "stub", "--stub", "7", "--faults", "1") as server:
        url[1] = server.url
        options = [*url, "--retries", "1", "--timeout", "1"]
        process = sample("stub", questions, out, *options)
    refused(process, "failed 2 times in a row", "run the same command to go on")
    assert sorted(texts(out)) == list(range(5))


def test_several_servers_share_the_queries(tmp_path, questions):
    stub = ("--model", "stub", "--stub", "7")
    with serving(*stub) as a, serving(*stub) as b:
        urls = ["--base-url", a.url, "--base-url", b.url, "-k", "2"]
        succeeded(sample("stub", questions, tmp_path / "out.jsonl", *urls))
        assert a.counts()["requests"] == b.counts()["requests"] == 160


def test_a_rate_limit_is_kept(tmp_path, questions):
    with serving("--model", "stub", "--stub", "7") as server:
        options = ["--base-url", server.url, "-k", "1", "--limit", "10"]
        out = tmp_path / "out.jsonl"
        start = time.monotonic()
        succeeded(
            sample("stub", questions, out, *options, "--requests-per-minute", "240")
        )
        assert time.monotonic() - start >= 9 * 0.25


def test_a_data_set_that_cannot_be_read_stops_before_the_model_loads(tmp_path):
    process = sample("nowhere/model", "gsm8", tmp_path / "o.jsonl")
    refused(process, "Did you mean 'gsm8k'")
    data = tmp_path / "q.jsonl"
    data.write_text('{"question": "A?", "answer": "1"}\n')
    process = sample("nowhere/model", str(data), tmp_path / "none" / "o.jsonl")
    refused(process, "--out: no folder")
    process = sample(str(tmp_path / "model"), str(data), tmp_path / "o.jsonl")
    refused(process, "MODEL: cannot load")
    assert not (tmp_path / "o.jsonl").exists()
    process = sample(LONG, str(data), tmp_path / "o.jsonl", "--timeout", "5")
    refused(process, "--timeout: works only with --base-url.")
    url = ["--base-url", "http://127.0.0.1:9/v1"]
    process = sample(LONG, str(data), tmp_path / "o.jsonl", *url, "--dtype", "auto")
    refused(process, "--dtype: works only in this process")
    process = sample(LONG, str(data), tmp_path / "o.jsonl", *url, "--extra-body", "{")
    refused(process, "--extra-body: not JSON")
    process = sample(LONG, str(data), tmp_path / "o.jsonl", "--device", "abacus")
    refused(process, "--device: 'abacus' cannot be used")


def test_ctrl_c_says_how_to_go_on(tmp_path, questions):
    out = tmp_path / "out.jsonl"
    with serving("--model", f"long={LONG}", "--delay", "0.5") as server:
        command = ["mergekit-rpam", "sample", "long", "--dataset", questions]
        command += ["--out", str(out), *TASK, "--base-url", server.url, "-k", "2"]
        process = subprocess.Popen(
            [str(SCRIPTS / command[0]), *command[1:], "--concurrency", "4"],
            stderr=subprocess.PIPE,
            text=True,
            # Shells start background jobs with the signal ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 60
        while not out.exists() or out.stat().st_size < 2000:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"stopped: {out} keeps what was finished" in errors
    assert "Traceback" not in errors
    assert len(texts(out)) >= 1


def test_help_needs_no_torch():
    code = (
        "import sys, rpam_mergekit.cli.main\n"
        "print([m for m in sys.modules if 'torch' in m])"
    )
    assert run(["python", "-c", code]).stdout.strip() == "[]"
    for command in ("sample", "grade", "label", "merge", "sweep", "compare", "report"):
        process = run(["mergekit-rpam", command, "--help"])
        succeeded(process)
        assert "Usage: mergekit-rpam" in process.stdout


def test_the_quickstarts_calibration_file_is_made_by_its_commands(tmp_path):
    """The commands of examples/quickstart/README.md, run as they stand."""
    for name in ("long", "short"):
        (tmp_path / name).symlink_to(QUICKSTART / name)
    for name in ("chains.py", "questions.py"):
        shutil.copy(QUICKSTART / name, tmp_path)
    lines = shell_lines(QUICKSTART / "README.md")
    first = next(n for n, line in enumerate(lines) if "questions.py" in line)
    for line in lines[first:]:
        process = run(shlex.split(line), cwd=tmp_path)
        succeeded(process)
    shares = shares_by_operations(process.stdout)
    assert list(shares) == list(chains.DIFFICULTIES)
    assert min(shares[d] for d in (1, 2, 3)) >= 0.95
    assert max(shares[d] for d in (6, 7, 8)) <= 0.15
    header = SampleReader(tmp_path / "long.samples.jsonl").header
    assert header["thinking"]["opened_by_prompt"] is False
    assert len(header["weights"]["digest"]) == 64
    made, committed = (
        {(q.prompt, q.pattern) for q in read_calibration(path).queries}
        for path in (tmp_path / "calibration.jsonl", QUICKSTART / "calibration.jsonl")
    )
    assert len(made) == len(committed) == 512
    # Other machines round otherwise, which may change a response, hence a label.
    assert len(made & committed) >= 0.95 * 512
