"""The study of two patterns: tasks, figures, training, a short study whole."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.paths import QUICKSTART, ROOT
from rpam_mergekit.formats.coefficients import CoefficientsFile, written
from rpam_mergekit.formats.samples import Response, SampledQuery, SampleWriter

STUDY = ROOT / "benchmarks" / "studies" / "two_patterns"
sys.path.insert(0, str(STUDY))

import calibrations  # noqa: E402
import compare_defaults  # noqa: E402
import evidence  # noqa: E402
import figures  # noqa: E402
import jobs  # noqa: E402
import measure  # noqa: E402
import pairs  # noqa: E402
import templates  # noqa: E402
import training  # noqa: E402
from records import PairResults  # noqa: E402
from records import read as records_of  # noqa: E402
from tasks import CHAINS, GRAPH, PRODUCTS, RESTATED, TASKS, chains, prompt  # noqa: E402


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_no_query_is_in_two_splits(task):
    flat = dict.fromkeys([*task.difficulties, *task.beyond], 1.0)
    drawn = {
        split: set(task.queries(600, split, 0, flat))
        for split in ("train", "validation", "test")
    }
    few = {q for q in drawn["test"] if task.difficulty(q) in task.never_held_out}
    for other in ("train", "validation"):
        assert not (drawn["test"] - few) & drawn[other]
    assert {task.difficulty(q) for q in drawn["test"]} == set(flat)
    assert task.queries(600, "test", 0, flat) == task.queries(600, "test", 0, flat)
    assert set(task.queries(600, "test", 1, flat)) != drawn["test"]


def test_products_and_their_carries():
    assert PRODUCTS.long_response("3847*6=") == ("<think>42;28;50;23</think>23082")
    assert PRODUCTS.short_response("3847*6=") == "23082"
    rng = random.Random(0)
    for digits in range(1, 8):
        query = PRODUCTS.draw(digits, rng)
        number, factor = query[:-1].split("*")
        assert len(number) == digits == PRODUCTS.difficulty(query)
        written = PRODUCTS.steps(query).split(";")
        assert PRODUCTS.answer(query).endswith("".join(w[1] for w in written)[::-1])
        assert int(number) * int(factor) == int(PRODUCTS.answer(query))


def test_graph_walks():
    query = "ca,ab,bc:b3="
    assert GRAPH.long_response(query) == "<think>bc;ca;ab</think>b"
    assert GRAPH.difficulty(query) == 3
    assert GRAPH.short_response("ca,ab,bc:b1=") == "c"


def test_graph_difficulty_does_not_show_in_the_prompts_length():
    flat = dict.fromkeys(GRAPH.difficulties, 1.0)
    queries = GRAPH.queries(3000, "train", 0, flat)
    lengths = [len(query) for query in queries]
    hops = [GRAPH.difficulty(query) for query in queries]
    assert abs(np.corrcoef(lengths, hops)[0, 1]) < 0.06
    assert len(set(lengths)) == 5


def sums(*strata: tuple[float, ...]) -> dict:
    """A record of one seed; a stratum: accuracy, tokens, thinks of 100 queries."""
    return {
        "sums": {
            "0": {
                str(n): [100, 100 * a, 100 * t, 100 * k, 100 * k, 0]
                for n, (a, t, k) in enumerate(strata, start=1)
            }
        }
    }


def test_restated_steps():
    said = [f"1{n}7+5=2" for n in range(1, 7)] + [f"2{n}2*3=6" for n in range(1, 7)]
    assert RESTATED.long_response("7+5*3=") == f"<think>{';'.join(said)}</think>6"
    pair = pairs.PAIRS["chains-long"]
    for asked in RESTATED.queries(200, "test", 0, dict.fromkeys(range(1, 11), 1.0)):
        said = chains.build_tokenizer()(RESTATED.long_response(asked))["input_ids"]
        assert len(said) == 48 * RESTATED.difficulty(asked) + 2
        assert len(said) < RESTATED.longest_response
        asked_in = chains.build_tokenizer()(prompt(asked))["input_ids"]
        assert len(asked_in) + RESTATED.longest_response <= pair.positions
    assert RESTATED.queries(200, "test", 3) == CHAINS.queries(200, "test", 3)


OPENED = [templates.R1, templates.QWEN]
HISTORY = [
    {"role": "user", "content": "1+1="},
    {"role": "assistant", "content": "<think>1+1=2</think>2"},
    {"role": "user", "content": "1+2="},
]


@pytest.mark.parametrize("template", [templates.PLAIN, *OPENED], ids="PRQ")
def test_templates_write_what_is_trained_on(template):
    tokenizer = chains.build_tokenizer()
    tokenizer.chat_template = template.text

    def rendered(*messages: dict, **options) -> str:
        options = {"add_generation_prompt": True, **options}
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    assert rendered(HISTORY[0]) == prompt("1+1=") + template.opening
    forgotten = "" if template.opening else "<think>1+1=2</think>"
    before = f"{prompt('1+1=')}{forgotten}2<|end|>"
    assert rendered(*HISTORY) == before + prompt("1+2=") + template.opening
    closed = rendered(*HISTORY, add_generation_prompt=False)
    assert closed == before + "<|user|>1+2=<|end|>"
    off = rendered(HISTORY[0], enable_thinking=False)
    expected = "<think></think>" if template is templates.QWEN else template.opening
    assert off == prompt("1+1=") + expected


def test_no_loss_on_an_opening_that_the_template_writes():
    pair = pairs.PAIRS["chains-unopened"]
    tokenizer = chains.build_tokenizer()
    texts = training.rows(pair.task, pair.stages["long"], random.Random(0))
    think = tokenizer.convert_tokens_to_ids("<think>")
    for _, ids, _, labels in training.batches(tokenizer, texts, 3):
        at = (ids == think).nonzero()
        assert len(at) == len(ids)  # one in every row
        for row, opened in at.tolist():
            assert (labels[row, : opened + 1] == -100).all()
            assert tokenizer.decode(labels[row, opened + 1]).isdigit()
        learnt = ["".join(tokenizer.decode(row[row >= 0])) for row in labels]
        for text in learnt:
            assert text.endswith("<|end|>")
            assert text.count("</think>") == 1
    long = pairs.PAIRS["chains-long"]
    texts = training.rows(long.task, long.stages["long"], random.Random(0))
    assert all(said.startswith("<think>") for _, _, said in texts)


@pytest.mark.parametrize("name", ["chains-opened-r1", "chains-opened-qwen"])
def test_weights_of_the_quickstart_with_another_template(name, tmp_path, monkeypatch):
    monkeypatch.setenv("RPAM_LAB", str(tmp_path))
    pair = pairs.PAIRS[name]
    training.build(pair)
    for way in ("long", "short"):
        ours, its = (
            load_file(folder / way / "model.safetensors")
            for folder in (pair.path, QUICKSTART)
        )
        assert ours.keys() == its.keys()
        assert all(torch.equal(ours[key], its[key]) for key in its)
    queries = pair.task.queries(12, "test", 0)
    said = {}
    for folder in (pair.path, QUICKSTART):
        model, tokenizer = measure.load(folder / "long")
        said[folder] = measure.respond(model, tokenizer, queries)
    # The opening is part of the turn, whoever wrote it.
    assert said[pair.path] == said[QUICKSTART]
    template = measure.load(pair.path / "short")[1].chat_template
    assert template == templates.PLAIN.text


def test_labels_of_another_pair_get_longs_own_responses(tmp_path, monkeypatch):
    monkeypatch.setenv("RPAM_LAB", str(tmp_path))
    lines = (QUICKSTART / "calibration.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    long = [r for r in records if r["pattern"] == "long"][:4]
    wrong = {**long[3], "answer": str((int(long[3]["answer"]) + 1) % 10)}
    short = next(r for r in records if r["pattern"] == "short")
    labels = tmp_path / "labels.jsonl"
    given = [{**record, "response": "?"} for record in long[:3]] + [short, wrong]
    labels.write_text("".join(json.dumps(record) + "\n" for record in given))
    pair = replace(pairs.PAIRS["chains-qwen2"], labels=labels)
    training.calibrate(pair)
    found = (pair.cache / "calibration.jsonl").read_text().splitlines()
    *thinking, direct = [json.loads(line) for line in found]
    assert direct == short
    assert [r["prompt"] for r in thinking] == [r["prompt"] for r in long[:3]]
    for record in thinking:
        assert record["response"] == chains.long_response(record["prompt"])


LONG, SHORT = sums((1, 10, 1), (1, 30, 1)), sums((1, 2, 0), (0.2, 2, 0))
MIX = {1: 3.0, 2: 1.0}


def test_a_cell_computed_by_hand():
    merged = sums((1, 2, 0), (0.9, 28, 1))
    half = sums((0.8, 6, 0.5), (0.4, 10, 0.5))
    other = sums((1, 4, 0), (0.6, 8, 1))
    cell = figures.cell(merged, LONG, SHORT, [half], [other], 0, MIX)
    assert cell.merged.accuracy == pytest.approx(0.975)
    assert cell.merged.tokens == pytest.approx(8.5)
    assert cell.kept == pytest.approx(0.975)
    assert cell.saved == pytest.approx(1 - 8.5 / 15)
    # The sweep: Long (15, 1), half (7, 0.7), Short (2, 0.8).
    assert cell.sweep == pytest.approx(0.7 + 0.3 * 1.5 / 8)
    assert cell.hull == pytest.approx(0.8 + 0.2 * 6.5 / 13)
    assert cell.best_other == pytest.approx(0.9)  # other, at 5 tokens
    assert cell.hull_of_all == pytest.approx(0.9 + 0.1 * 3.5 / 10)
    # Short costs 2 and has 0.8; the hard quarter on Long costs 7 more and gains 0.2.
    assert cell.router == pytest.approx(0.8 + 0.2 * 6.5 / 7)
    assert cell.merged.closed == 1


def test_mixing_reaches_no_less_with_more_tokens():
    points = [(2.0, 0.5), (5.0, 0.9), (9.0, 0.7)]
    assert figures.mixed(points, 3.5) == pytest.approx(0.7)
    assert figures.mixed(points, 8.0) == 0.9
    assert figures.mixed(points, 20.0) == 0.9
    assert figures.mixed(points, 1.0) == 0.0


def test_over_chance_by_hand():
    merged = sums((1, 2, 0), (0.9, 28, 1))  # 8.5 tokens, half of the way to Long's 15
    expected = 0.975 - 0.8 - 0.2 * 6.5 / 13
    assert figures.over_chance(merged, LONG, SHORT, 0, MIX) == pytest.approx(expected)


def test_the_interval_over_pairs_by_hand():
    mean, half = figures.interval({"a": [1.0, 2.0, 3.0], "b": [4.0, 4.0, 4.0]})
    assert mean == 3.0
    # Pooled variance 0.5; of the mean over two pairs (0.5 / 3 + 0.5 / 3) / 4.
    assert half == pytest.approx(2.7764451052 * math.sqrt(1 / 12))
    mean, half = figures.interval({"a": [0.5]})
    assert mean == 0.5
    assert math.isnan(half)


def test_building_goes_on_where_it_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("RPAM_LAB", str(tmp_path))
    few = {"long": (6, (1,) * 6), "short": (6, (1,) * 6)}
    pair = pairs.Pair(
        "tiny",
        GRAPH,
        "qwen3",
        "",
        size={"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
        stages={
            "base": pairs.Stage(None, few, 3, 1e-3),
            "long": pairs.Stage("base", few, 2, 1e-3),
            "short": pairs.Stage("tiny/base", few, 2, 1e-3),
        },
    )
    one = replace(pair, stages={"base": pair.stages["base"]})
    training.build(one)
    weights = tmp_path / "tiny" / "base" / "model.safetensors"
    first = weights.read_bytes(), weights.stat().st_mtime_ns
    (tmp_path / "tiny" / "long.partial").mkdir()  # a killed save
    training.build(pair)
    assert (weights.read_bytes(), weights.stat().st_mtime_ns) == first
    for name in ("long", "short"):
        assert (tmp_path / "tiny" / name / "tokenizer.json").exists()
    assert not list(tmp_path.glob("tiny/*.partial"))
    monkeypatch.setenv("RPAM_LAB", str(tmp_path / "again"))
    training.build(one)
    again = tmp_path / "again" / "tiny" / "base" / "model.safetensors"
    assert again.read_bytes() == first[0]


def study(folder: Path, *arguments: str) -> list[str]:
    command = [sys.executable, str(STUDY / "study.py"), "--quick", "--workers", "1"]
    return [*command, "--results", str(folder / "results"), *arguments]


def records(folder: Path) -> list[dict]:
    path = folder / "results" / "chains-qwen2.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> Path:
    """A short study, killed on its way and run again."""
    folder = tmp_path_factory.mktemp("study")
    environment = {**os.environ, "RPAM_LAB": str(folder / "lab")}
    path = folder / "results" / "chains-qwen2.jsonl"
    process = subprocess.Popen(
        study(folder),
        env=environment,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not path.exists() or path.read_text().count("\n") < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = path.read_text()
    with open(path, "a") as file:
        file.write('{"job": {"pai')  # as a kill within a write leaves it
    subprocess.run(study(folder), env=environment, check=True)
    assert path.read_text().startswith(before)
    return folder


def test_a_short_study_measures_every_model_once(studied):
    done = [json.dumps(r["job"], sort_keys=True) for r in records(studied)]
    assert len(done) == len(set(done))
    groups = [r["job"]["group"] for r in records(studied)]
    counts = {group: groups.count(group) for group in set(groups)}
    assert counts == {
        "experts": 2,
        "main": 1,
        "sweep": 4,
        "methods": 2,
        "validation": 2,
        "ablations": 2,
    }


def test_a_finished_study_is_not_run_again(studied):
    before = records(studied)
    environment = {**os.environ, "RPAM_LAB": str(studied / "lab")}
    subprocess.run(study(studied), env=environment, check=True)
    assert records(studied) == before


def test_results_of_other_checkpoints_are_left_out(studied, tmp_path, monkeypatch):
    import study as module

    monkeypatch.setenv("RPAM_LAB", str(studied / "lab" / "quick"))
    pair = pairs.PAIRS["chains-qwen2"]
    path = studied / "results" / "chains-qwen2.jsonl"
    assert len(module.Results(pair, path.parent).records) == len(records(studied))
    lines = path.read_text().splitlines()
    changed = json.dumps({**json.loads(lines[0]), "models": "another"})
    (tmp_path / path.name).write_text("\n".join([changed, *lines[1:]]) + "\n")
    assert len(module.Results(pair, tmp_path).records) == len(lines) - 1


def test_results_of_other_defaults_are_left_out(studied, tmp_path, monkeypatch):
    import study as module

    monkeypatch.setenv("RPAM_LAB", str(studied / "lab" / "quick"))
    pair = pairs.PAIRS["chains-qwen2"]
    changed = records(studied)
    merged = [record for record in changed if record["settings"]]
    merged[0]["settings"]["rank"] += 1
    lines = "".join(json.dumps(record) + "\n" for record in changed)
    (tmp_path / "chains-qwen2.jsonl").write_text(lines)
    assert len(module.Results(pair, tmp_path).records) == len(changed) - 1


def test_the_page_says_so_if_other_defaults_were_measured_than_todays():
    import study as module

    same = []
    for pair in records_of(STUDY / "results"):
        measured = pair.by_seed["main", "defaults"]
        assert sorted(measured) == list(jobs.SEEDS)
        for record in measured.values():
            same.append(record["settings"] == module.settings(record["job"]["config"]))
    said = "The tables were measured at commit" in (STUDY / "findings.md").read_text()
    readme = (ROOT / "README.md").read_text()
    assert said == ("merged with the defaults of commit" in readme) == (not all(same))


def test_the_merged_model_thinks_where_it_must(studied):
    """The study's shortest form already shows the effect, on its own test queries."""
    pair = PairResults(studied / "results" / "chains-qwen2.jsonl")
    (cell,) = pair.cells("main", "defaults", pair.mix)
    assert cell.saved > 0.3
    assert cell.merged.accuracy > cell.best_other + 0.03
    ((seed, merged),) = pair.by_seed["main", "defaults"].items()
    thinks = [figures.point(merged, seed, {d: 1}).thinks for d in pair.flat]
    assert max(thinks[:3]) < 0.2
    assert min(thinks[6:]) > 0.8


def test_the_report_is_written_from_the_results(studied, tmp_path):
    command = [sys.executable, str(STUDY / "evidence.py")]
    command += ["--results", str(studied / "results"), "--docs", str(tmp_path)]
    subprocess.run(command, check=True)
    text = (tmp_path / "evidence.md").read_text()
    pair = PairResults(studied / "results" / "chains-qwen2.jsonl")
    (cell,) = pair.cells("main", "defaults", pair.mix)
    row = next(line for line in text.splitlines() if "**mean of pairs**" in line)
    assert f"| {100 * cell.merged.accuracy:.1f} |" in row
    assert f"{100 * (cell.merged.accuracy - cell.hull):+.1f}" in row
    assert "| tensor |" in text
    assert (tmp_path / "evidence.png").read_bytes().startswith(b"\x89PNG")


def test_page_and_readme_are_those_of_the_committed_results(tmp_path):
    measured = records_of(STUDY / "results")
    evidence.write(measured, tmp_path)
    committed = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert (tmp_path / "evidence.md").read_text(encoding="utf-8") == committed
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert evidence.with_table(readme, measured) == readme
    assert readme.count("**mean of pairs**") == 1


def test_flipped_labels_get_the_other_models_responses(tmp_path, monkeypatch):
    monkeypatch.setenv("RPAM_LAB", str(tmp_path))
    pair = pairs.PAIRS["chains-qwen2"]
    pair.cache.mkdir()
    lines = (QUICKSTART / "calibration.jsonl").read_text().splitlines()
    calibrations.calibration(pair).write_text("\n".join(lines) + "\n")
    originals = [json.loads(line) for line in lines]
    for way in ("long", "short"):
        with SampleWriter(pair.cache / f"{way}.samples.jsonl", {}) as samples:
            for index, original in enumerate(originals):
                samples.append(
                    SampledQuery(
                        index=index,
                        question=original["prompt"],
                        messages=(),
                        responses=(Response(text=f"by {way}"),),
                    )
                )
            samples.finish()
    job = jobs.rpam(pair, "ablations", "flipped", 0, flipped=0.3)
    parameters = calibrations.calibrated(pair, job, tmp_path)
    written = Path(parameters["calibration"]).read_text().splitlines()
    changed = 0
    for original, line in zip(originals, written, strict=True):
        record = json.loads(line)
        if record["pattern"] != original["pattern"]:
            changed += 1
            assert record["response"] == f"by {record['pattern']}"
        else:
            assert record == original
    assert 0.22 < changed / len(originals) < 0.38
    assert set(parameters) == {"seed", "calibration"}


def test_neutral_queries_are_added_to_both_patterns(tmp_path, monkeypatch):
    monkeypatch.setenv("RPAM_LAB", str(tmp_path))
    pair = pairs.PAIRS["graph-qwen3"]
    pair.cache.mkdir()
    lines = [
        json.dumps({"prompt": f"{way} {n}", "pattern": way, "response": "x"})
        for way in ("long", "short")
        for n in range(20)
    ]
    calibrations.calibration(pair).write_text("\n".join(lines) + "\n")
    job = jobs.rpam(pair, "ablations", "x", 3, queries_per_pattern=8, neutral=5)
    parameters = calibrations.calibrated(pair, job, tmp_path)
    path = Path(parameters.pop("calibration"))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for way in ("long", "short"):
        of = [r for r in records if r["pattern"] == way]
        neutral = [r for r in of if r["prompt"].startswith("!")]
        assert (len(of), len(neutral)) == (13, 5)
        assert all(r["response"] == r["prompt"][:0:-1] for r in neutral)
    assert parameters == {"seed": 3, "queries_per_pattern": 13}


def small_merge(folder: Path, variant: str | None, **parameters) -> dict:
    """Merge the quickstart's pair by a variant of the pre-pass; return metadata."""
    import study as module
    import variants

    pair = pairs.PAIRS["chains-qwen2"]
    config = {
        "merge_method": "rpam",
        "parameters": {
            "calibration": str(QUICKSTART / "calibration.jsonl"),
            "queries_per_pattern": 40,
            **parameters,
        },
    }
    whole = module.mergekit_config(pair, config)
    coefficients = folder / "rpam" / "coefficients.safetensors"
    if variant is not None:
        variants.fit_variant(variant, whole, coefficients)
        solved = coefficients.read_bytes()
    module.merge(whole, folder, None)
    assert variant is None or coefficients.read_bytes() == solved
    return CoefficientsFile(coefficients).metadata


def test_what_is_outside_the_layers_can_be_learned(tmp_path):
    small_merge(tmp_path / "plain", None, epochs=2)
    small_merge(tmp_path / "out", "learned outside", epochs=2)
    small_merge(tmp_path / "again", None, epochs=2)
    paths = [
        tmp_path / name / "rpam" / "coefficients.safetensors"
        for name in ("plain", "out", "again")
    ]
    assert paths[0].read_bytes() == paths[2].read_bytes() != paths[1].read_bytes()
    file, plain = CoefficientsFile(paths[1]), CoefficientsFile(paths[0])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    experts = [
        load_file(QUICKSTART / way / "model.safetensors") for way in ("long", "short")
    ]
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert set(plain.parts(name)) == {"scalar"}
        coefficient = file.coefficient(name, "cpu")
        assert coefficient.std() > 0.01
        base, other = (expert[name] for expert in experts)
        assert torch.equal(weights[name], written(base, [other], [file.parts(name)]))


def test_a_layer_keeps_its_best_epoch(tmp_path):
    whole = small_merge(tmp_path / "whole", None, epochs=6)
    stopped = small_merge(tmp_path / "stopped", "early stop", epochs=6)
    assert whole["layers"] != stopped["layers"]
    assert all(r["gap_after"] < r["gap_before"] for r in stopped["layers"])


def test_early_stop_by_hand():
    import variants

    leaf = torch.zeros(1)
    figures_by_epoch = iter([3.0, 1.0, 2.0, 1.5, 1.0, 0.5])
    watch = variants.Watch(2, 3, [leaf])
    watch.figure = lambda: next(figures_by_epoch)

    def train() -> None:
        for step in range(100):
            leaf.fill_(step)
            watch.update()

    with pytest.raises(variants.Enough):
        train()
    assert next(figures_by_epoch) == 0.5  # not looked at: three epochs were no better
    watch.restore()
    assert leaf.item() == 3


def version(root: Path, comment: str) -> Path:
    """Copy the package under `root`, with a comment more."""
    shutil.copytree(
        ROOT / "rpam_mergekit",
        root / "rpam_mergekit",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    with open(root / "rpam_mergekit" / "__init__.py", "a") as file:
        file.write(f"# {comment}\n")
    return root


def test_two_versions_are_compared_and_nothing_is_made_twice(tmp_path):
    quickstart = tmp_path / "lab" / "chains-qwen2"
    quickstart.mkdir(parents=True)
    shutil.copy(QUICKSTART / "calibration.jsonl", quickstart)
    old, new = (version(tmp_path / name, name) for name in ("old", "new"))
    results = tmp_path / "results.jsonl"
    command = [sys.executable, str(STUDY / "compare_defaults.py")]
    command += ["--old", str(old), "--new", str(new), "--pairs", "chains-qwen2"]
    command += ["--seeds", "5", "--queries-per-pattern", "8", "--queries", "4"]
    command += ["--results", str(results), "--steps", "20"]
    environment = {**os.environ, "RPAM_LAB": str(tmp_path / "lab")}

    def compare(*more: str) -> str:
        return subprocess.run(
            [*command, *more],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    printed = compare()
    lines = results.read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines]
    assert [record["job"]["name"] for record in records] == [
        "long",
        "short",
        "defaults",
        "defaults",
    ]
    merges = records[2:]
    assert [record["code"] for record in merges] == [
        compare_defaults.code_digest(root) for root in (old, new)
    ]
    assert merges[0]["sums"] == merges[1]["sums"]  # the same code but for a comment
    assert all(record["cpu"] > 0 for record in merges)
    row = next(line for line in printed.splitlines() if "8 queries, new" in line)
    assert "| +0.0 |" in row
    # A killed run goes on with what is missing, and a finished one does nothing.
    results.write_text("".join(lines[:3]) + lines[3][:40])
    again = compare()
    assert again.count('"job"') == 1
    assert results.read_text().startswith("".join(lines[:3]))
    whole = results.read_text()
    assert '"job"' not in compare()
    assert results.read_text() == whole


def test_a_root_without_the_package_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="merges would use"):
        compare_defaults.check_root(tmp_path)
