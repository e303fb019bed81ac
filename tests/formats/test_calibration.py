"""The calibration reader says what is wrong, where, and draws by seed."""

from __future__ import annotations

import json

import pytest

from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.calibration import draw_queries, read_calibration

LONG = {"prompt": "hard?", "pattern": "long", "response": "<think>x</think>y"}
SHORT = {"prompt": "easy?", "pattern": "short"}


@pytest.fixture
def write(tmp_path):
    def call(*lines: dict | str):
        path = tmp_path / "c.jsonl"
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(text), encoding="utf-8")
        return path

    return call


def refused(path) -> str:
    with pytest.raises(RpamError) as caught:
        read_calibration(path)
    return str(caught.value)


def test_queries_come_in_file_order_with_their_lines(write):
    calibration = read_calibration(write(LONG, "", SHORT))
    assert [q.pattern for q in calibration.queries] == ["long", "short"]
    assert calibration.lines == (1, 3)
    assert calibration.queries[0].conversation == [{"role": "user", "content": "hard?"}]


def test_messages_are_conversations(write):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
    ]
    calibration = read_calibration(write(LONG, {"messages": turns, "pattern": "short"}))
    assert calibration.queries[1].conversation == turns


def test_where_a_label_comes_from_may_be_recorded(write):
    read_calibration(write(LONG, {**SHORT, "source": {"dataset": "x"}, "k": 12}))


def test_the_digest_changes_with_the_content(write):
    first = read_calibration(write(LONG, SHORT)).digest
    assert read_calibration(write(LONG, SHORT)).digest == first
    assert read_calibration(write(LONG, {**SHORT, "prompt": "x"})).digest != first


def test_a_missing_file_says_where_it_was_looked_for(tmp_path):
    message = refused(tmp_path / "none.jsonl")
    assert str(tmp_path / "none.jsonl") in message
    assert "relative to the folder" in message


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(write, content):
    assert "the calibration file is empty" in refused(write(content))


def test_one_pattern_only_is_refused(write):
    message = refused(write(SHORT, SHORT))
    assert "no query has the pattern 'long' (found: 0 long, 2 short)" in message


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[1]", "found a JSON list, expected an object"),
        ({"prompt": "x"}, "pattern: missing"),
        ({"prompt": "x", "patern": "long"}, "Did you mean 'patern'?"),
        ({"promt": "x", "pattern": "long"}, "Did you mean 'prompt' by 'promt'?"),
        ({"message": [], "pattern": "long"}, "Did you mean 'messages' by 'message'?"),
        ({**SHORT, "respons": "1"}, "respons: unknown key. Did you mean 'response'?"),
        ({"prompt": "x", "pattern": "lnog"}, "Did you mean 'long'?"),
        ({"pattern": "long"}, "exactly one of 'prompt' and 'messages'"),
        ({**SHORT, "messages": [{"role": "user", "content": "x"}]}, "exactly one of"),
        ({"prompt": "", "pattern": "long"}, "prompt: found ''"),
        ({"messages": [{"role": "user"}], "pattern": "long"}, "messages.0.content"),
        ({**SHORT, "long_accuracy": 1.5}, "long_accuracy: found 1.5"),
        ({**SHORT, "response": 3}, "response: found 3"),
    ],
)
def test_a_bad_line_is_named_with_its_field(write, line, problem):
    path = write(LONG, SHORT, line)
    message = refused(path)
    assert f"{path}:3: " in message
    assert problem in message


def test_further_keys_are_kept(write):
    """Such as those of the data set; one that is near to a key that is there, too."""
    path = write(LONG, {**SHORT, "prompts": "x", "source": "y", "reply": "z"})
    assert len(read_calibration(path).queries) == 2


def test_every_bad_line_is_listed(write):
    path = write({"prompt": "x"}, LONG, {"pattern": "short"})
    message = refused(path)
    assert f"{path}:1: pattern" in message
    assert f"{path}:3: " in message


def test_a_file_of_garbage_does_not_flood_the_screen(write):
    message = refused(write(*["nonsense"] * 500))
    assert message.count("\n") < 30
    assert "480 more problems" in message


def test_text_that_is_not_utf8_is_named_by_line(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"prompt": "x", "pattern": "long"}\n\xff\xfe\n')
    assert f"{path}:2: not UTF-8" in refused(path)


def test_the_draw_is_seeded_and_balanced(write):
    queries = [
        {**(LONG if i % 3 else SHORT), "prompt": f"question {i}"} for i in range(60)
    ]
    calibration = read_calibration(write(*queries))
    usable = [True] * 60
    drawn = draw_queries(calibration, usable, 10, seed=0)
    assert drawn == draw_queries(calibration, usable, 10, seed=0)
    assert drawn != draw_queries(calibration, usable, 10, seed=1)
    patterns = [calibration.queries[i].pattern for i in drawn]
    assert patterns.count("long") == patterns.count("short") == 10
    assert drawn == sorted(set(drawn))


def test_unusable_queries_are_never_drawn(write):
    calibration = read_calibration(write(LONG, SHORT, LONG, SHORT))
    assert draw_queries(calibration, [False, True, True, True], 9, 0) == [1, 2, 3]
