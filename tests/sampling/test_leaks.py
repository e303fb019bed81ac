"""The leak guard."""

from __future__ import annotations

import json

import chains
import pytest

from helpers.paths import ROOT
from rpam_mergekit.errors import RpamError
from rpam_mergekit.questions.leaks import LeakGuard, normalized, read_guard

DATA = ROOT.parent / "shared" / "data"
LONG = (
    "Janet\u2019s ducks lay 16 eggs per day. She eats three for breakfast. How many "
    "does she sell, in dozens, at the farmers' market?"
)


def guard(*questions: str) -> LeakGuard:
    guard = LeakGuard()
    guard.add("benchmark", questions)
    return guard


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("What  is\n$7 + 5$?", "what is 7+5"),
        ("Janet\u2019s ducks.", "Janet's ducks"),
        (r"$\left( \dfrac{1}{2} \right)$", r"(\frac{1}{2})"),
        ("x\u00b2", "x2"),
        ("7 \u2212 5", "7 - 5"),
    ],
)
def test_presentation_does_not_count(a, b):
    assert normalized(a) == normalized(b)


@pytest.mark.parametrize(
    ("a", "b"),
    [("7+5*3=", "7-5*3="), ("7*5", "75"), ("f'(x)", "f(x)"), ("x<5", "x>5")],
)
def test_mathematics_does_count(a, b):
    assert normalized(a) != normalized(b)


def test_a_question_inside_a_prompt_leaks():
    assert guard(LONG).leak(f"Solve this.\n\n{LONG}\n\nBox it.") == "benchmark"
    assert guard(LONG).leak(LONG[:100]) is None
    assert guard("7+5=").leak("What is 7+5=?") is None  # too short to be held
    assert guard("7+5=").leak("7 + 5 =") == "benchmark"


def test_leaks_are_counted_per_set(tmp_path):
    for name, text in (("a", "First?"), ("b", "Second?")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"problem": text}) + "\n")
    found = read_guard([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    texts = ["first", "Second", "Third?", "FIRST?"]
    assert [bool(found.leak(text)) for text in texts] == [True, True, False, True]
    assert list(found.counts.values()) == [1, 1]
    assert list(found.found.values()) == [2, 1]


def test_what_is_no_evaluation_set_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "A?"}\n')
    with pytest.raises(RpamError, match=r"a\.jsonl:1: no question"):
        read_guard([str(path)])
    path.write_text("")
    with pytest.raises(RpamError, match="holds no question"):
        read_guard([str(path)])
    with pytest.raises(RpamError, match="--exclude: no file"):
        read_guard([str(tmp_path / "b.jsonl")])


@pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")
def test_the_authors_whole_pool_is_flagged_and_fresh_queries_are_not():
    benchmarks = DATA / "benchmarks"
    names = ("gsm8k_test", "math500", "aime24")
    found = read_guard([str(benchmarks / f"{name}.jsonl") for name in names])
    pool = [
        json.loads(line)["instruction"]
        for name in ("long", "short")
        for line in (DATA / "pool" / f"{name}.jsonl").read_text().splitlines()
    ]
    assert len(pool) == 1812
    assert sum(found.leak(text) is not None for text in pool) == 1812
    fresh = []
    for name in ("aime25", "minerva", "olympiadbench"):
        for line in (benchmarks / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            fresh.append(row.get("problem") or row["question"])
    fresh += chains.queries(400, "train", seed=1)
    assert len(fresh) > 1300
    assert [text for text in fresh if found.leak(text)] == []
