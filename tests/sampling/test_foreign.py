"""Sample files of lm-eval and of the minimal format, by the commands."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoTokenizer

from helpers.commands import run, succeeded
from helpers.paths import QUICKSTART
from rpam_mergekit.formats.samples import SampleReader


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lm_eval(doc_id: int, target: str, *responses: str, **more) -> dict:
    """Return a line as lm-eval 0.4 writes it for a generation task."""
    question = f"Question {doc_id}?"
    return {
        "doc_id": doc_id,
        "doc": {"question": question, "answer": target},
        "target": target,
        "arguments": {
            "gen_args_0": {"arg_0": f"Q: {question}\nA:", "arg_1": {"until": ["\n"]}}
        },
        "resps": [list(responses)],
        "filtered_resps": [responses[0]],
        "filter": "strict-match",
        "exact_match": 0.0,
        "doc_hash": "x",
        **more,
    }


def minimal(question: str, answer, *responses, **more) -> dict:
    return {"question": question, "answer": answer, "responses": responses, **more}


def graded(tmp_path, *rows, options=()):
    source = write(tmp_path / "in.jsonl", *rows)
    out = tmp_path / "out.jsonl"
    process = run(["mergekit-rpam", "grade", source, "--out", str(out), *options])
    succeeded(process)
    return list(SampleReader(out)), process.stdout


def refusal(tmp_path, *rows) -> str:
    source = write(tmp_path / "in.jsonl", *rows)
    out = tmp_path / "out.jsonl"
    process = run(["mergekit-rpam", "grade", source, "--out", str(out)])
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    return process.stderr


def test_samples_of_lm_eval_are_graded_once_per_query(tmp_path):
    chat = json.dumps([{"role": "user", "content": "Chat 2?"}])
    queries, output = graded(
        tmp_path,
        lm_eval(0, "x\n#### 18", "It is 18.", r"<think>a</think>\boxed{19}"),
        lm_eval(0, "x\n#### 18", "again", filter="flexible-extract"),
        lm_eval(1, "7", "7", arguments=[["Q: 1?\nA:", {}]], resps=[["7"]]),
        lm_eval(2, "7", "8", arguments={"gen_args_0": {"arg_0": [chat]}}),
    )
    assert [q.question for q in queries] == [f"Question {n}?" for n in range(3)]
    assert [[r.correct for r in q.responses] for q in queries] == [
        [True, False],
        [True],
        [False],
    ]
    assert queries[0].messages == ({"role": "user", "content": "Question 0?"},)
    assert queries[2].messages == ({"role": "user", "content": "Chat 2?"},)
    assert queries[0].responses[1].thinking == "closed"
    assert queries[0].source == {"file": "in.jsonl", "doc_id": 0}
    assert "accuracy          50.0%" in output
    assert "mean tokens       unknown" in output


def test_the_minimal_format(tmp_path):
    queries, output = graded(
        tmp_path,
        minimal("A?", "5", "5", "<think>7</think>5", "<think>no end 5"),
        minimal("B?", ["1", "2"], {"text": "2, 1", "tokens": 7, "finish": "stop"}),
        minimal("C?", "9", {"text": "9", "tokens": 3, "finish": "length"}),
        {"prompt": "D?", "responses": ["x", "y"], "correct": [True, False]},
        options=["--tokenizer", str(QUICKSTART / "long")],
    )
    assert [[r.correct for r in q.responses] for q in queries] == [
        [True, True, False],
        [True],
        [False],
        [True, False],
    ]
    assert queries[0].responses[1].tokens == 4  # counted
    assert [q.responses[0].tokens for q in queries[1:3]] == [7, 3]
    assert "cut off           14.3%" in output


def test_a_sample_file_can_be_graded_anew(tmp_path):
    graded(tmp_path, minimal("A?", "5", "6"))
    old = tmp_path / "out.jsonl"
    fixed = tmp_path / "fixed.jsonl"
    fixed.write_text(old.read_text().replace('"values":["5"]', '"values":["6"]'))
    new = tmp_path / "new.jsonl"
    succeeded(run(["mergekit-rpam", "grade", str(fixed), "--out", str(new)]))
    assert [r.correct for r in next(iter(SampleReader(new))).responses] == [True]
    again = run(["mergekit-rpam", "grade", str(fixed), "--out", str(new)])
    assert again.returncode == 1
    assert "is finished; name another file" in again.stderr


def test_a_grading_goes_on_and_keeps_what_is_unfinished_so(tmp_path):
    graded(tmp_path, *(minimal(f"{n}?", "5", "5") for n in range(4)))
    whole = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    unfinished = tmp_path / "unfinished.jsonl"
    unfinished.write_text("".join(whole[:-1]))
    out = tmp_path / "new.jsonl"
    command = ["mergekit-rpam", "grade", str(unfinished), "--out", str(out)]
    process = run(command)
    succeeded(process)
    assert "has not finished" in process.stderr
    reader = SampleReader(out)
    assert len(list(reader)) == 4
    assert not reader.finished
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:3]))
    unfinished.write_text("".join(whole))
    succeeded(run(command))
    reader = SampleReader(out)
    assert sorted(q.index for q in reader) == [0, 1, 2, 3]
    assert reader.finished


def test_other_markers_are_taken_for_granted_once_named(tmp_path):
    options = ["--think-open", "[T]", "--think-close", "[/T]"]
    queries, _ = graded(tmp_path, minimal("A?", "5", "[T]4[/T]5"), options=options)
    assert queries[0].responses[0].thinking == "closed"
    new = str(tmp_path / "new.jsonl")
    succeeded(
        run(["mergekit-rpam", "grade", str(tmp_path / "out.jsonl"), "--out", new])
    )
    assert next(iter(SampleReader(new))).responses[0].thinking == "closed"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "A?"}, "in.jsonl:2: neither a sample of mergekit-rpam"),
        (minimal("A?", "5"), "in.jsonl:2: responses: found []"),
        (minimal("A?", "5", 7), "in.jsonl:2: responses.0: expected a text"),
        (minimal("A?", None, "x"), "in.jsonl:2: no 'answer' to grade"),
        (minimal("", "5", "x"), "in.jsonl:2: no question"),
        (minimal("A?", "5", "x", tokens=[1, 2]), "in.jsonl:2: tokens: expected a list"),
        (
            minimal("A?", "5", {"text": "5", "tokens": "9"}),
            "in.jsonl:2: responses.0.tokens: found '9', expected int.",
        ),
        (
            minimal("A?", None, "5", correct=["yes"]),
            "in.jsonl:2: responses.0.correct: found 'yes', expected bool.",
        ),
        (lm_eval(1, "", "7"), "in.jsonl:2: target: found '', expected an answer"),
        (
            lm_eval(1, "7", "7", resps=[[[-1.5, False]]]),
            "in.jsonl:2: resps: expected texts",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, row, expected):
    assert expected in refusal(tmp_path, minimal("First?", "5", "5"), row)


def test_an_empty_file_is_refused(tmp_path):
    assert "the file is empty" in refusal(tmp_path)


def test_label_takes_them_as_they_are(tmp_path):
    long = write(
        tmp_path / "long.jsonl",
        lm_eval(0, "18", "<think>long</think>18", "18"),
        lm_eval(1, "7", "7", "7"),
    )
    short = write(
        tmp_path / "short.jsonl",
        minimal("Question 0?", "18", "1", "2"),
        minimal("Question 1?", "7", "7", "7."),
    )
    out = tmp_path / "calibration.jsonl"
    process = run(["mergekit-rpam", "label", long, short, "--out", str(out)])
    succeeded(process)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["prompt"], r["pattern"], r["response"]) for r in rows] == [
        ("Question 0?", "long", "<think>long</think>18"),
        ("Question 1?", "short", "7"),
    ]


@pytest.mark.parametrize("column", ["Problem", "Question", "PROMPT", "problem "])
def test_a_question_column_in_letters_of_any_case(tmp_path, column):
    row = {**lm_eval(0, "18", "18"), "doc": {column: "What is 9*2?", "answer": "18"}}
    queries, _ = graded(tmp_path, row)
    assert queries[0].question == "What is 9*2?"
    assert queries[0].responses[0].correct
    (tmp_path / "out.jsonl").unlink()
    row = {column: "What is 9*2?", "Answer": "18", "responses": ["18"]}
    queries, _ = graded(tmp_path, row)
    assert [r.correct for r in queries[0].responses] == [True]


def test_responses_that_are_messages_of_a_server(tmp_path):
    parts = [{"type": "thinking", "thinking": "9*2"}, {"type": "text", "text": "18"}]
    queries, _ = graded(
        tmp_path,
        minimal(
            "9*2?",
            "18",
            {"role": "assistant", "content": "18", "reasoning_content": "9*2"},
            {"content": parts, "finish": "stop"},
            {"content": None, "reasoning": "18"},
        ),
    )
    turn = "<think>\n9*2\n</think>\n\n18"
    assert [r.text for r in queries[0].responses] == [turn, turn, "18"]
    assert all(r.correct for r in queries[0].responses)


def test_what_did_not_end_is_no_answer(tmp_path):
    ends = ["stop", "eos_token", "length", "abort", "content_filter", None]
    responses = [{"text": "18", "finish": end} for end in ends]
    queries, output = graded(tmp_path, minimal("9*2?", "18", *responses))
    right = [r.correct for r in queries[0].responses]
    assert right == [True, True, False, False, False, True]
    assert "cut off           16.7%" in output
    assert "stopped otherwise 33.3% (abort 1, content_filter 1)" in output


def test_end_tokens_of_the_named_tokenizer_are_removed(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(QUICKSTART / "long", model)
    path = model / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [3, 9]}))
    (end,) = AutoTokenizer.from_pretrained(model).convert_ids_to_tokens([9])
    row = minimal("9*2?", "18", f"18{end}", "18<|im_end|>\n")
    options = ["--tokenizer", str(model)]
    queries, _ = graded(tmp_path, row, options=options)
    assert [r.text for r in queries[0].responses] == ["18", "18"]
    ours = tmp_path / "ours.jsonl"
    text = (tmp_path / "out.jsonl").read_text()
    ours.write_text(text.replace('"text":"18"', json.dumps({"text": f"18{end}"})[1:-1]))
    command = [
        "mergekit-rpam",
        "grade",
        str(ours),
        "--out",
        str(tmp_path / "new.jsonl"),
    ]
    succeeded(run([*command, *options]))
    (query,) = SampleReader(tmp_path / "new.jsonl")
    assert [(r.text, r.correct) for r in query.responses] == [("18", True)] * 2
