"""The typed requests: the options of the commands, and functions for Python users."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging

import pytest
from click.testing import CliRunner

from helpers.commands import run
from helpers.paths import QUICKSTART
from rpam_mergekit.cli.main import main
from rpam_mergekit.cli.sample import sampling_options
from rpam_mergekit.errors import RpamError
from rpam_mergekit.evaluate.compare_files import CompareRequest, compare
from rpam_mergekit.formats.calibration import read_calibration
from rpam_mergekit.formats.samples import SampleReader
from rpam_mergekit.sampling.label_files import label
from rpam_mergekit.sampling.request import (
    GradeRequest,
    LabelRequest,
    SampleRequest,
    SamplingOptions,
)
from rpam_mergekit.sampling.sample import grade, sample

REQUESTS = {
    "sample": SampleRequest,
    "grade": GradeRequest,
    "label": LabelRequest,
    "compare": CompareRequest,
}
SHORTEST = {
    "sample": "model --dataset d --out o",
    "grade": "source --out o",
    "label": "long short --out o",
    "compare": "file --out o",
}
# What a command prints or draws of the outcome is no part of its request.
SHOWN = {"label": {"by", "plot"}, "compare": {"out"}}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_commands_options_are_its_requests_fields(name):
    fields = {field.name: field for field in dataclasses.fields(REQUESTS[name])}
    command = main.commands[name]
    required = {
        name
        for name, field in fields.items()
        if field.default is field.default_factory is dataclasses.MISSING
    }
    shown = SHOWN.get(name, set())
    assert required == {p.name for p in command.params if p.required} - shown
    given = command.make_context(name, SHORTEST[name].split()).params
    assert fields.keys() == given.keys() - shown
    for field in fields.keys() - required - {"extra_body"}:
        assert given[field] == fields[field].default, field


def test_requests_refuse_the_numbers_that_the_options_refuse():
    for name, request_type in REQUESTS.items():
        required = {
            field.name: ["x"] if field.name == "files" else "x"
            for field in dataclasses.fields(request_type)
            if field.default is field.default_factory is dataclasses.MISSING
        }
        for param in main.commands[name].params:
            least = getattr(param.type, "min", None)
            if least is None:
                continue
            too_small = least if param.type.min_open else least - 0.01
            with pytest.raises(RpamError, match=f"{param.name}: found {too_small}, "):
                request_type(**required, **{param.name: too_small})
            accepted = least + 1 if param.type.min_open else least
            request_type(**required, **{param.name: accepted})
    with pytest.raises(RpamError) as refusal:
        SampleRequest(model="m", out="o", dataset="d", top_p=1.5, dtype="int8", limit=0)
    assert len(refusal.value.findings) == 3


@pytest.mark.parametrize(
    "words",
    [
        "--dataset gsm8k",
        "--dataset q.jsonl -k 4 --limit 3 --temperature 0 --top-k 20 --seed 5",
        "--dataset=q.jsonl --opened-by-prompt --trust-remote-code --batch-size 1",
        "--dataset q.jsonl --not-opened-by-prompt --think-open <t> --shuffle -1",
        "--dataset q.jsonl --instruction= --system --odd --grading-time-limit 0.5",
    ],
)
def test_options_of_a_request_are_those_that_make_it(words):
    options = sampling_options(words.split())
    again = sampling_options(options.arguments())
    assert again == options
    assert type(again) is SamplingOptions


def test_a_request_to_servers_has_the_options_that_make_it():
    request = SampleRequest(
        model="m",
        out="o",
        dataset="d",
        base_url=("http://a", "http://b"),
        extra_body={"min_p": 0.05, "x": [1]},
        concurrency=2,
        requests_per_minute=1.5,
        tokenizer="t",
    )
    command = main.commands["sample"]
    words = ["m", "--out", "o", *request.arguments()]
    params = command.make_context("sample", words).params
    assert params["base_url"] == request.base_url
    assert json.loads(params["extra_body"]) == request.extra_body
    for name in ("concurrency", "requests_per_minute", "tokenizer", "dataset"):
        assert params[name] == getattr(request, name)


def test_a_sweep_refuses_options_before_it_reads_its_config(tmp_path):
    for words, status, message in (
        ("--dataset d --base-url http://x", 1, "--base-url: cannot be given"),
        ("--dataset d --concurrency 64", 1, "--concurrency: works only with --base-u"),
        ("--dataset d --no-such-option", 2, "--no-such-option"),
        ("", 2, "--dataset"),
    ):
        given = ["sweep", "no.yml", "--out", str(tmp_path / "x"), *words.split()]
        result = CliRunner().invoke(main, given)
        assert (result.exit_code, message in result.output) == (status, True), words
    assert not (tmp_path / "x").exists()


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(*correct: str) -> list[dict]:
    """Return queries of the minimal format, each answered twice."""
    return [
        {
            "question": f"What is 3 + {n}?",
            "answer": str(3 + n),
            "responses": [
                f"<think>3 + {n}</think>{3 + n if said == 'r' else 'none'}"
                for said in pair
            ],
        }
        for n, pair in enumerate(correct)
    ]


@pytest.fixture
def samples(tmp_path):
    """Two files in the minimal format: of three queries Long alone solves one."""
    return (
        write(tmp_path / "long.jsonl", *rows("rr", "rr", "rw")),
        write(tmp_path / "short.jsonl", *rows("ww", "rr", "rr")),
    )


def test_grading_labelling_and_comparing_from_python(tmp_path, samples, capfd):
    graded = tmp_path / "graded.jsonl"
    tally = grade(GradeRequest(source=samples[0], out=str(graded), graders=1))
    assert (tally.queries, tally.responses, tally.correct) == (3, 6, 5)
    assert SampleReader(graded).header["source"] == "long.jsonl"

    out = tmp_path / "calibration.jsonl"
    request = LabelRequest(long=graded, short=samples[1], out=out, graders=1)
    labels = label(request)
    assert [(row.query.index, row.pattern) for row in labels.chosen] == [
        (0, "long"),
        (1, "short"),
        (2, "short"),
    ]
    assert [q.pattern for q in read_calibration(out).queries] == [
        "long",
        "short",
        "short",
    ]

    comparison = compare(CompareRequest(files=[*samples, graded], draws=100, graders=1))
    rows_of = comparison.rows["queries"]
    assert rows_of["long"]["accuracy"].value == pytest.approx(5 / 6)
    assert rows_of["short"]["accuracy"].value == pytest.approx(4 / 6)
    assert rows_of["graded"] == {
        **rows_of["graded"],
        "accuracy": rows_of["long"]["accuracy"],
    }
    assert capfd.readouterr().out == ""


def test_messages_go_where_they_are_told_to_go(tmp_path, samples, caplog):
    source = tmp_path / "ours.jsonl"
    grade(GradeRequest(source=samples[0], out=source, graders=1))
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join(lines[:-1]))  # as of a run that has not finished
    said: list[str] = []
    message = f"note: the run that writes {source} has not finished"
    with caplog.at_level(logging.WARNING):
        grade(GradeRequest(source=source, out=tmp_path / "a", graders=1), said.append)
        assert (said, caplog.messages) == ([message], [])
        grade(GradeRequest(source=source, out=tmp_path / "b", graders=1))
        assert caplog.messages == [message]


def test_an_unfinished_file_is_refused_unless_partial_is_asked_for(tmp_path, samples):
    ours = tmp_path / "ours.jsonl"
    grade(GradeRequest(source=samples[0], out=ours, graders=1))
    lines = ours.read_text().splitlines(keepends=True)
    ours.write_text("".join(lines[:-1]))
    request = LabelRequest(
        long=ours, short=samples[1], out=tmp_path / "out.jsonl", graders=1
    )
    with pytest.raises(RpamError, match=r"has not finished \(3 queries so far\)"):
        label(request)
    assert len(label(dataclasses.replace(request, partial=True)).chosen) == 3


def test_sampling_from_python_where_a_loop_runs_as_in_a_notebook(tmp_path, capfd):
    questions = write(
        tmp_path / "questions.jsonl",
        {"question": "7+5", "answer": "2"},
        {"question": "3*3", "answer": "9"},
    )
    request = SampleRequest(
        model=str(QUICKSTART / "short"),
        dataset=str(questions),
        out=tmp_path / "short.samples.jsonl",
        samples=2,
        max_tokens=16,
        device="cpu",
        graders=1,
    )

    async def in_a_cell():
        return sample(request, said.append)

    said: list[str] = []
    first = sample(dataclasses.replace(request, limit=1), said.append)
    assert (first.queries, first.responses, said) == (1, 2, [])
    request = dataclasses.replace(request, out=tmp_path / "two.jsonl")
    tally = asyncio.run(in_a_cell())
    assert (tally.queries, tally.responses) == (2, 4)
    assert len(list(SampleReader(tmp_path / "two.jsonl"))) == 2
    again = sample(request, said.append)
    assert again == tally
    assert said == [f"{request.out} has 2 queries; 0 are left."]
    assert capfd.readouterr().out == ""


def test_a_script_that_grades_at_its_top_is_told_what_to_do(tmp_path):
    """Its grading processes import it, and would each begin the same run."""
    row = {"question": "q", "answer": "x+1", "responses": [r"\\boxed{1+x}"]}
    (tmp_path / "minimal.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "script.py").write_text(
        "from rpam_mergekit import GradeRequest, grade\n"
        "request = GradeRequest(source='minimal.jsonl', out='graded.jsonl')\n"
        "if True:\n    grade(request)\n"
    )
    process = run(["python", "script.py"], tmp_path)
    assert process.returncode != 0
    assert "call this under `if __name__" in process.stderr
    graded = tmp_path / "graded.jsonl"
    assert '"correct":null' not in graded.read_text()
    code = (tmp_path / "script.py").read_text()
    code = code.replace("if True:", "if __name__ == '__main__':")
    (tmp_path / "script.py").write_text(code)
    process = run(["python", "script.py"], tmp_path)
    assert process.returncode == 0, process.stderr
    assert '"correct":true' in graded.read_text().replace(" ", "")
