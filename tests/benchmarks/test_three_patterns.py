"""The benchmark of three experts: its task, its grades, and a quick run whole."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys

import pytest

from helpers.benchmarks import benchmark, number, tables
from helpers.paths import ROOT
from rpam_mergekit.formats.calibration import read_calibration
from rpam_mergekit.formats.samples import Response, SampledQuery, SampleWriter

sys.path.insert(0, str(ROOT / "benchmarks" / "studies" / "three_patterns"))

import compare as three
import experts as trio
import merges
from experts import PATTERNS, TASK

END = trio.END


def test_every_expert_has_a_form_of_its_own():
    rng = random.Random(0)
    for difficulty in TASK.difficulties:
        query = TASK.draw(difficulty, rng)
        ways = TASK.long_response, TASK.short_response, trio.postfix
        for pattern, respond in zip(PATTERNS, ways, strict=True):
            assert trio.form(respond(query) + END) == pattern
    for none in ("", "12", "<think>7+5=2</think>", "<think>7+5=2", "75", "+"):
        assert trio.form(none + END) is None
    assert trio.form("7") is None  # cut off


def test_a_program_is_right_where_it_is_asked_for_and_a_value_where_that_is():
    assert trio.postfix("7+5*3>") == "75+3*"
    value, program = "7+5*3=", "7+5*3>"
    assert trio.right(value, "6" + END)
    assert trio.right(value, "<think>7+5=2;2*3=6</think>6" + END)
    assert trio.right(program, "75+3*" + END)
    assert not trio.right(value, "75+3*" + END)
    assert not trio.right(program, "6" + END)
    assert not trio.right(program, "75+3-" + END)
    assert not trio.right(value, "6")


def test_a_chain_is_in_one_split_whatever_is_asked_of_it():
    assert TASK.split("7+5*3-2=") == TASK.split("7+5*3-2>")
    chains = {
        split: {q[:-1] for p in PATTERNS for q in trio.queries(p, 200, split, 0)}
        for split in ("train", "validation", "test")
    }
    for one, other in itertools.combinations(chains.values(), 2):
        assert not one & other
    rng = random.Random(0)
    for _ in range(100):
        assert TASK.split(TASK.chat(rng)[0]) == "train"


def test_queries_are_those_that_the_pattern_is_meant_for():
    asked = {p: trio.queries(p, 100, "test", 3) for p in PATTERNS}
    assert all(len(set(of)) == 100 for of in asked.values())
    assert all(q.endswith("=") and "*0" not in q for q in asked["long"])
    assert all(q.endswith("=") and q[-5:-3] == "*0" for q in asked["short"])
    assert all(q.endswith(">") for q in asked["code"])
    lengths = {p: sum(map(len, of)) / 100 for p, of in asked.items()}
    assert max(lengths.values()) - min(lengths.values()) < 1
    assert trio.queries("long", 100, "test", 4) != asked["long"]


def test_the_grid_of_uniform_merges():
    grid = list(merges.uniform(10, 2))
    linear = [job.weights for job in grid if job.method == "linear"]
    assert len(linear) == len(set(linear)) == 66 - 3
    assert all(sum(weights) == pytest.approx(1) for weights in linear)
    sums = [sum(job.weights) for job in grid if job.method == "task_arithmetic"]
    assert min(sums) == pytest.approx(0.25)
    assert max(sums) == pytest.approx(3)
    near = [job.weights for job in merges.around((0.5, 0.4, 0.1), 0.05)]
    assert len(set(near)) == 26
    assert (0.45, 0.4, 0.15) in near
    assert {job.method for job in grid} == set(three.METHODS)
    assert len({job.key for job in grid}) == len(grid)


def test_a_cell_computed_by_hand():
    sums = {
        "2": {p: [10, 8, 6, 5, 40, 10 * (p == "long")] for p in PATTERNS},
        "3": {p: [10, 10, 10, 10, 20, 0] for p in PATTERNS},
    }
    first, second = three.figures(sums)
    assert first["both"] == 0.5
    assert first["long thinks"] == 1
    assert first["thinks"] == pytest.approx(1 / 3)
    assert second["tokens"] == 2
    assert three.cell([first["both"], second["both"]]) == "75.0 ± 25.0"
    assert three.cell([0.5]) == "50.0"
    routed = three.router([sums, {"2": sums["3"], "3": sums["3"]}, sums])
    assert routed["2"]["short"] == sums["3"]["short"]
    assert routed["2"]["code"] == sums["2"]["code"]


def test_a_quick_run_and_one_that_goes_on(tmp_path):
    options = ("--quick", "--folder", str(tmp_path))
    process = benchmark("studies/three_patterns/compare", *options)
    whole, parts = tables(process)
    assert [row[""] for row in parts] == [row[""] for row in whole]
    named = {row[""]: row for row in whole}
    by_pattern = {row[""]: row for row in parts}
    for pattern in PATTERNS:
        # Even experts that are wrong have learned their form.
        row = by_pattern[f"{pattern} alone"]
        others = [p for p in PATTERNS if p != pattern]
        assert number(row[f"{pattern}: its form"]) > 80
        assert all(number(row[f"{other}: its form"]) < 20 for other in others)
    for method in three.METHODS:
        assert any(name.startswith(f"best {method} ") for name in named)
    assert number(named["router that knows the pattern"]["form of its expert"]) > 80
    assert "**merged with rpam**" in named
    assert "\n4 uniform merges." in process.stdout

    results = tmp_path / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:-1]) + lines[-1][:20])  # killed as it wrote
    again = benchmark("studies/three_patterns/compare", *options)
    assert tables(again) == [whole, parts]
    assert results.read_text().splitlines(keepends=True) == lines


def test_the_script_of_the_docs_adds_a_third_pattern(tmp_path):
    two = [{"prompt": p, "pattern": p} for p in ("long", "short")]
    calibration = tmp_path / "calibration.jsonl"
    calibration.write_text("".join(json.dumps(line) + "\n" for line in two))
    graded = {"none right": (False, None), "two right": (True, False, True)}
    with SampleWriter(tmp_path / "code.samples.jsonl", {}) as samples:
        for index, (question, grades) in enumerate(graded.items()):
            responses = [
                Response(text="pass" * (9 - at), correct=grade)
                for at, grade in enumerate(grades)
            ]
            samples.append(
                SampledQuery(
                    index=index, question=question, messages=(), responses=responses
                )
            )
        samples.finish()
    page = (ROOT / "docs" / "patterns.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    *_, added = read_calibration(calibration, PATTERNS).queries
    assert (added.prompt, added.pattern) == ("two right", "code")
    assert added.response == "pass" * 7
    assert len(calibration.read_text().splitlines()) == 3
