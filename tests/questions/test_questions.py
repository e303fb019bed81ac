"""Data sets: JSONL files, the benchmarks' raw rows, the Hub's loader."""

from __future__ import annotations

import json
import sys

import pytest

from helpers.commands import run
from rpam_mergekit.errors import RpamError
from rpam_mergekit.questions.benchmarks import CHOICE, MATH, PRESETS
from rpam_mergekit.questions.load import load_questions
from rpam_mergekit.questions.rows import Dataset, UnusableRow


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def load(path, *rows, **options):
    how = {k: options.pop(k) for k in list(options) if k in Dataset.__annotations__}
    return load_questions(Dataset(write(path / "q.jsonl", *rows), **how), **options)


def refusal(path, *rows, **options) -> str:
    with pytest.raises(RpamError) as error:
        load(path, *rows, **options)
    return str(error.value)


def test_a_jsonl_file_is_read(tmp_path):
    loaded = load(
        tmp_path,
        {"question": "7+5=?", "answer": 12, "level": 3},
        "",
        {"prompt": "Roots?", "answer": ["-1", "2"]},
        {"messages": [{"role": "user", "content": "Hi?"}], "answer": "so\n#### 4"},
        {"problem": "Area?", "answer": "9", "unit": "cm^2", "tolerance": 0.5},
        {"question": "Which?", "answer": "B", "choices": ["x", "y"]},
    )
    first, roots, chat, area, choice = loaded.questions
    assert first.question == "7+5=?"
    assert first.messages == ({"role": "user", "content": "7+5=?"},)
    assert first.source == {
        "dataset": "q.jsonl",
        "row": 0,
        "level": 3,
    }
    assert roots.gold.values == ("-1", "2")
    assert (chat.question, chat.gold.values) == ("Hi?", ("4",))
    assert (area.gold.unit, area.gold.tolerance) == ("cm^2", 0.5)
    assert choice.gold.choices == ("x", "y")
    assert [q.index for q in loaded.questions] == [0, 1, 2, 3, 4]


def test_a_boxed_gold_is_its_box(tmp_path):
    row = {"question": "?", "answer": r"Thus $\boxed{\frac{1}{2}}$."}
    assert load(tmp_path, row).questions[0].gold.values == (r"\frac{1}{2}",)


def test_instruction_and_system_go_around_the_question(tmp_path):
    loaded = load(
        tmp_path, {"question": "A?", "answer": "1"}, instruction="Box it.", system="S"
    )
    assert loaded.questions[0].question == "A?"
    assert loaded.questions[0].messages == (
        {"role": "system", "content": "S"},
        {"role": "user", "content": "A?\n\nBox it."},
    )


@pytest.mark.parametrize("names", [("Problem", "Answer"), ("QUESTION", "Gold")])
def test_columns_are_known_in_letters_of_any_case(tmp_path, names):
    row = dict(zip(names, ("7+5=?", 12), strict=True))
    (question,) = load(tmp_path, {**row, "Year": 2024}).questions
    assert (question.question, question.gold.values) == ("7+5=?", ("12",))
    assert question.source["Year"] == 2024
    both = {**row, "question": "first?", "answer": 3}
    assert load(tmp_path, both).questions[0].question == "first?"


def test_the_parts_of_a_turn_are_put_together(tmp_path):
    parts = [{"type": "text", "text": "7+5"}, {"type": "text", "text": "=?"}]
    row = {"messages": [{"role": "user", "content": parts}], "answer": 12}
    assert load(tmp_path, row).questions[0].question == "7+5=?"
    parts.append({"type": "image_url", "image_url": {"url": "data:,"}})
    assert "a list of objects with 'role' and 'content'" in refusal(tmp_path, row)


def test_columns_can_be_named(tmp_path):
    row = {"q": "A?", "a": "1"}
    named = {"question_column": "q", "answer_column": "a"}
    assert load(tmp_path, row, **named).questions[0].gold.values == ("1",)
    assert "--question-column: no 'p'. " in refusal(tmp_path, row, question_column="p")


def test_every_bad_line_is_named(tmp_path):
    message = refusal(
        tmp_path,
        {"question": "A?", "answer": "1"},
        {"question": " ", "answer": "1"},
        {"question": "B?"},
        {"question": "C?", "answer": ""},
        {"text": "D?", "answer": "1"},
        {"question": "E?", "answer": "F", "choices": ["x", "y"]},
        {"question": "F?", "answer": "1", "tolerance": -1},
        {"messages": [], "answer": "1"},
        {"messages": [{"role": "assistant", "content": "x"}], "answer": "1"},
    )
    for expected in (
        "q.jsonl:2: question: found ' ', expected a text.",
        "q.jsonl:3: no answer: expected a field answer, gold, target; found question.",
        "q.jsonl:4: answer: found '', expected an answer.",
        "q.jsonl:5: no question: expected a field question, ",
        "q.jsonl:6: answer: found 'F', expected one of the letters A to B.",
        "q.jsonl:7: tolerance: found -1. ",
        "q.jsonl:8: messages: expected a list of objects",
        "q.jsonl:9: messages: the last turn is of 'assistant', expected 'user'.",
    ):
        assert expected in message


def test_a_torn_line_is_named(tmp_path):
    message = refusal(tmp_path, {"question": "A?", "answer": "1"}, '{"question": ')
    assert "q.jsonl:2: not JSON" in message
    assert "q.jsonl:1: found a JSON list" in refusal(tmp_path, "[1]")


def test_missing_and_misspelt_data_sets(tmp_path):
    with pytest.raises(RpamError, match=r"--dataset: no file nowhere\.jsonl"):
        load_questions(Dataset("nowhere.jsonl"))
    with pytest.raises(RpamError, match="Did you mean 'gsm8k'"):
        load_questions(Dataset("gsm8"))
    with pytest.raises(
        RpamError, match=r"unknown preset 'gms8k'\. Did you mean 'gsm8k'"
    ):
        load(tmp_path, {"question": "A?", "answer": "1"}, preset="gms8k")
    with pytest.raises(RpamError, match="holds no queries"):
        load(tmp_path)


def test_the_order_is_shuffled_by_a_seed_and_the_digest_is_not(tmp_path):
    rows = [{"question": f"{n}?", "answer": n} for n in range(50)]
    plain, a, b, other = (load(tmp_path, *rows, shuffle=s) for s in (None, 1, 1, 2))
    orders = [[q.index for q in s.questions] for s in (plain, a, b, other)]
    assert orders[0] == list(range(50))
    assert orders[1] == orders[2] != orders[3] != orders[0]
    assert len({s.description["digest"] for s in (plain, a, b, other)}) == 1


def test_the_digest_knows_prompt_and_gold(tmp_path):
    row = {"question": "A?", "answer": "1"}
    digests = {
        load(tmp_path, row).description["digest"],
        load(tmp_path, row, instruction="Box it.").description["digest"],
        load(tmp_path, {**row, "answer": "2"}).description["digest"],
    }
    assert len(digests) == 3


GPQA = {
    "Question": "Which energy?",
    "Correct Answer": "10^-4 eV",
    "Incorrect Answer 1": "10^-11 eV",
    "Incorrect Answer 2": "10^-8 eV",
    "Incorrect Answer 3": "10^-9 eV",
    "Record ID": "rec06",
}
OLYMPIAD = {
    "id": 1,
    "context": "Let $N$ be even.",
    "question": "Find all.",
    "final_answer": ["$69$,$84$"],
    "is_multiple_answer": True,
    "unit": "minute",
    "error": "1e-1",
}


@pytest.mark.parametrize(
    ("preset", "row", "values", "more"),
    [
        ("gsm8k", {"question": "A?", "answer": "x\n#### 1,080"}, ("1,080",), {}),
        ("math", {"problem": "A?", "solution": r"\boxed{\frac12}"}, (r"\frac12",), {}),
        ("math500", {"problem": "A?", "answer": "p - q"}, ("p - q",), {}),
        (
            "minerva",
            {"problem": "A?", "solution": "s=\\boxed{1.6} \\mathrm{~cm}\n\\]"},
            ("1.6",),
            {"unit": "cm", "relative_tolerance": 0.01},
        ),
        (
            "olympiadbench",
            OLYMPIAD,
            ("69", "84"),
            {"unit": "minute", "tolerance": 0.1},
        ),
        ("aime24", {"problem": "A?", "answer": "204"}, ("204",), {}),
        ("aime25", {"problem": "A?", "answer": 70}, ("70",), {}),
    ],
)
def test_raw_rows(tmp_path, preset, row, values, more):
    question = load(tmp_path, row, preset=preset).questions[0]
    assert question.gold.values == values
    for name, value in more.items():
        assert getattr(question.gold, name) == value
    assert question.messages[-1]["content"].endswith(f"\n\n{MATH}")


def test_context_stands_before_the_question(tmp_path):
    question = load(tmp_path, OLYMPIAD, preset="olympiadbench").questions[0]
    assert question.question == "Let $N$ be even.\n\nFind all."


def test_choices_are_shuffled_the_same_way_every_time(tmp_path):
    a, b = (load(tmp_path, GPQA, preset="gpqa-diamond").questions[0] for _ in range(2))
    assert a == b
    right = "ABCD".index(a.gold.values[0])
    assert a.gold.choices[right] == "10^-4 eV"
    assert f"{a.gold.values[0]}) 10^-4 eV" in a.question
    assert a.messages[-1]["content"].endswith(CHOICE)
    letters = {
        load(tmp_path, {**GPQA, "Question": f"Which {n}?"}, preset="gpqa-diamond")
        .questions[0]
        .gold.values[0]
        for n in range(20)
    }
    assert letters == set("ABCD")


def test_unusable_rows_of_a_preset_are_counted(tmp_path):
    loaded = load(
        tmp_path,
        {"question": "A?", "answer": "#### 1"},
        {"question": "B?", "answer": "no number"},
        preset="gsm8k",
    )
    assert len(loaded.questions) == 1
    assert "1 rows were left out" in loaded.notes[0]
    assert "q.jsonl:2: answer: no '#### N' at its end." in loaded.notes[0]
    with pytest.raises(RpamError, match="no '#### N'"):
        load(tmp_path, {"question": "B?", "answer": "no number"}, preset="gsm8k")


def test_a_data_set_folder_goes_through_the_hubs_loader(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", {"question": "A?", "answer": "x #### 7"})
    write(folder / "test.jsonl", {"question": "B?", "answer": "x #### 8"})
    train = load_questions(Dataset(str(folder), split="train"))
    test = load_questions(Dataset(str(folder), split="test", preset="gsm8k"))
    assert train.questions[0].gold.values == ("7",)
    assert test.questions[0].gold.values == ("8",)
    assert test.questions[0].messages[-1]["content"].endswith(MATH)
    with pytest.raises(RpamError, match="--split: say which split"):
        load_questions(Dataset(str(folder)))
    with pytest.raises(RpamError, match="split nothing"):
        load_questions(Dataset(str(folder), split="nothing"))


def test_a_preset_that_cannot_be_downloaded_says_so(tmp_path):
    out = str(tmp_path / "out.jsonl")
    process = run(
        ["mergekit-rpam", "sample", "m", "--dataset", "math500", "--out", out]
    )
    assert process.returncode == 1
    assert "--dataset: cannot load HuggingFaceH4/MATH-500, split test" in process.stderr
    assert "Traceback" not in process.stderr


def test_without_the_extra_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RpamError, match=r"pip install 'rpam-mergekit\[sample\]'"):
        load_questions(Dataset(str(tmp_path), split="train"))


def test_calibration_presets_default_to_training_splits():
    assert PRESETS["gsm8k"].split == PRESETS["math"].split == "train"
    assert PRESETS["gsm8k"].evaluation == PRESETS["math"].evaluation == "test"


def test_a_row_without_an_answer_is_unusable():
    with pytest.raises(UnusableRow, match="answer: found None"):
        PRESETS["aime24"].read({"problem": "A?", "answer": None}, 0)
