"""The pair the repo carries: what it is, and what its evaluation computes."""

from __future__ import annotations

import json
import math
import random

import chains
import evaluate
import pytest
import torch
from transformers import AutoTokenizer

from helpers.commands import run, succeeded
from helpers.merged import tensors
from helpers.paths import QUICKSTART, ROOT
from rpam_mergekit.formats.calibration import read_calibration


def test_the_task_is_evaluated_from_left_to_right():
    query = "7+5*3-2="
    assert chains.operations(query) == 3
    assert chains.steps(query) == ["7+5=2", "2*3=6", "6-2=4"]
    assert chains.long_response(query) == "<think>7+5=2;2*3=6;6-2=4</think>4"
    assert chains.short_response(query) == "4"
    assert chains.answer("3-7=") == "6"


def test_drawn_queries_have_the_difficulty_asked_for():
    rng = random.Random(0)
    for difficulty in chains.DIFFICULTIES:
        assert chains.operations(chains.draw(difficulty, rng)) == difficulty


def test_splits_do_not_overlap_from_three_operations_on():
    sets = {
        split: {q for q in chains.queries(600, split, 0) if chains.operations(q) > 2}
        for split in ("train", "validation", "test")
    }
    assert not sets["train"] & sets["validation"]
    assert not sets["train"] & sets["test"]
    assert not sets["validation"] & sets["test"]


def test_the_calibration_file_leaks_no_held_out_query():
    calibration = read_calibration(QUICKSTART / "calibration.jsonl")
    assert all(chains.split(query.prompt) == "train" for query in calibration.queries)
    patterns = [query.pattern for query in calibration.queries]
    assert min(patterns.count("long"), patterns.count("short")) >= 64
    assert all(query.response for query in calibration.queries)


def test_the_calibration_responses_are_correct():
    for query in read_calibration(QUICKSTART / "calibration.jsonl").queries:
        answer = chains.answer(query.prompt)
        assert evaluate.grade(answer, query.response + "<|end|>")["correct"]


def test_the_pair_is_small():
    size = sum(
        file.stat().st_size
        for expert in ("long", "short")
        for file in (QUICKSTART / expert).iterdir()
    )
    assert size < 10e6


@pytest.mark.parametrize(
    ("response", "correct", "thinks", "closed"),
    [
        ("4<|end|>", 1, 0, None),
        ("5<|end|>", 0, 0, None),
        ("4", 0, 0, None),
        ("44<|end|>", 0, 0, None),
        ("<think>7+5=2</think>4<|end|>", 1, 1, 1),
        ("<think>7+5=2</think>5<|end|>", 0, 1, 1),
        ("<think>7+5=2</think></think>4<|end|>", 0, 1, 0),
        ("<think>7+5=24<|end|>", 0, 1, 0),
        ("<think>7+5=2</think>4", 0, 1, 1),
        ("</think>4<|end|>", 0, 0, None),
    ],
)
def test_grading(response, correct, thinks, closed):
    grade = evaluate.grade(chains.answer("7+5*3-2="), response)
    assert grade == {"correct": correct, "thinks": thinks, "closed": closed}


def result(weight: float, accuracy: float, tokens: float) -> evaluate.Result:
    stratum = {"accuracy": accuracy, "tokens": tokens, "thinking": 1.0}
    by = dict.fromkeys(chains.DIFFICULTIES, stratum)
    return evaluate.Result("x", weight, 100, accuracy, tokens, 1.0, 1.0, by)


def test_the_sweep_is_read_at_the_same_tokens_and_its_hull_above_it():
    points = [result(0, 1.0, 30), result(0.5, 0.5, 20), result(1, 0.6, 10)]
    assert math.isclose(evaluate.at_tokens(points, 25), 0.75)
    assert math.isclose(evaluate.hull_at_tokens(points, 25), 0.9)
    assert math.isclose(evaluate.at_tokens(points, 10), 0.6)


def test_difficulties_can_be_weighed_alike():
    skewed = result(0, 0.9, 5)
    easy = {"accuracy": 1.0, "tokens": 2.0, "thinking": 0.0}
    hard = {"accuracy": 0.5, "tokens": 20.0, "thinking": 1.0}
    skewed.by_difficulty = {1: easy, 8: hard}
    level = evaluate.equally_frequent(skewed)
    assert (level.accuracy, level.tokens) == (0.75, 11.0)


def test_the_sweep_is_refined_where_it_jumps():
    """A jump at 0.47 is resolved to the smallest step; flat parts stay coarse."""
    long, short = result(0, 1.0, 30), result(1, 0.6, 2)

    def measure(weight: float) -> evaluate.Result:
        return result(weight, *((1.0, 30) if weight < 0.47 else (0.6, 2)))

    points = evaluate.sweep(long, short, measure)
    around = [p.weight for p in points if abs(p.weight - 0.47) < 0.01]
    assert len(around) >= 2
    assert max(p.weight for p in points if p.tokens == 30) > 0.46
    assert len(points) < 20


def test_the_sweep_in_memory_is_mergekits_linear(tmp_path, mergekit_yaml):
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(QUICKSTART / "long"),
        "models": [{"model": str(QUICKSTART / "short"), "parameters": {"weight": 0.4}}],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    succeeded(mergekit_yaml(config))
    on_disk = tensors(tmp_path / "out")
    long, short = (evaluate.load(QUICKSTART / name) for name in ("long", "short"))
    in_memory = evaluate.interpolated(long, short, 0.4).state_dict()
    assert on_disk.keys() == in_memory.keys()
    for name, value in on_disk.items():
        assert torch.equal(value.float(), in_memory[name]), name


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """The quickstart's merge as `make quickstart` runs it."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    config = QUICKSTART / "rpam.yml"
    succeeded(run(["mergekit-yaml", str(config), str(out)], cwd=ROOT))
    return out


def test_the_merged_model_thinks_only_where_it_must(merged):
    """The figures of the README, on fewer queries, against the sweep in one run."""
    script = str(QUICKSTART / "evaluate.py")
    process = run(["python", script, str(merged), "--queries", "1000"])
    succeeded(process)
    report = json.loads((merged / "results.json").read_text())
    long, model = report["sweep"][0], report["merged"]
    # 95 % of Long's accuracy, but for twice the sampling error of 1000 queries.
    error = (model["accuracy"] * (1 - model["accuracy"]) / model["queries"]) ** 0.5
    assert model["accuracy"] + 2 * error >= 0.95 * long["accuracy"]
    assert model["tokens"] <= 0.85 * long["tokens"]
    assert model["accuracy"] >= report["sweep_at_tokens"] + 0.15
    assert model["by_difficulty"]["1"]["thinking"] <= 0.05
    assert model["by_difficulty"]["8"]["thinking"] >= 0.95
    assert report["router"]["tokens"] <= 0.75 * long["tokens"]


def test_the_merged_model_keeps_the_chat_template(merged):
    long = AutoTokenizer.from_pretrained(QUICKSTART / "long")
    assert AutoTokenizer.from_pretrained(merged).chat_template == long.chat_template
