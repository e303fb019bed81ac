"""Labels: the rule, what is chosen, what is left out, what is shown."""

from __future__ import annotations

import dataclasses
import json

import pytest

from rpam_mergekit.errors import RpamError
from rpam_mergekit.evaluate import label_report
from rpam_mergekit.formats.calibration import read_calibration
from rpam_mergekit.formats.samples import Response, SampledQuery
from rpam_mergekit.grading.responses import Markers
from rpam_mergekit.questions.leaks import LeakGuard
from rpam_mergekit.sampling.labels import Candidate, Summary, label_queries, pattern_of
from rpam_mergekit.sampling.labels import write_calibration as write


@pytest.mark.parametrize(
    ("long", "short", "pattern"),
    [
        ((0, 12), (0, 12), None),
        ((12, 12), (12, 12), "short"),
        ((7, 12), (7, 12), "short"),
        ((12, 12), (0, 12), "long"),
        ((0, 12), (12, 12), "short"),
        ((1, 12), (0, 12), "long"),
        ((0, 12), (1, 12), "short"),
        ((8, 12), (7, 12), "long"),
        ((11, 12), (12, 12), "short"),
        ((1, 1), (0, 1), "long"),
        ((1, 1), (1, 1), "short"),
        # k differs: a gain below half a response of the coarser file decides nothing.
        ((10, 12), (3, 4), "short"),
        ((11, 12), (3, 4), "long"),
        ((3, 4), (8, 12), "short"),
        ((4, 4), (10, 12), "long"),
        ((7, 8), (3, 4), "short"),  # a gain of just 1 / (2 * 4)
        ((1, 12), (0, 1), "short"),
        ((0, 1), (0, 12), None),
    ],
)
def test_the_rule(long, short, pattern):
    assert pattern_of(*long, *short) == pattern


def response(text: str, tokens: int | None, correct: bool | None, **more) -> Response:
    return Response(text=text, tokens=tokens, correct=correct, **more)


def candidate(index: int, *responses: Response, question: str | None = None):
    question = question or f"question {index}"
    return Candidate.of(
        SampledQuery(
            index=index,
            question=question,
            messages=({"role": "user", "content": question},),
            source={"level": index % 2},
            responses=responses,
        )
    )


RIGHT, WRONG = response("r", 5, True), response("w", 4, False)
THOUGHT = response("<think>t</think>r", 5, True, thinking="closed")


def pairs(*rows: tuple[int, int]):
    """Return candidates of both models by their correct responses out of two."""
    sides = []
    for side, right in enumerate((THOUGHT, RIGHT)):
        sides.append(
            [
                candidate(n, *[right] * row[side], *[WRONG] * (2 - row[side]))
                for n, row in enumerate(rows)
            ]
        )
    return sides


def test_the_shortest_proper_correct_response_is_kept():
    summary = Summary.of(
        SampledQuery(
            index=0,
            question="?",
            messages=(),
            responses=(
                response("aaaa", 9, True, thinking="closed"),
                response("bbb", 7, True, thinking="closed"),
                response("c", 2, False),
                response("d", 3, True, thinking="wrong"),
                response("e", 4, True, thinking="open"),
                response("f", 1, None, problem="lost"),
            ),
        )
    )
    assert summary.best.text == "bbb"
    assert (summary.correct, summary.count, summary.lost) == (4, 6, 1)


def lucky(index: int, *more: Response):
    """Return a query that Long gets right at once, and with nothing in its block."""
    at_once = response("9", 2, True)
    empty = response("<think>\n\n</think>\n9", 4, True, thinking="closed")
    return candidate(index, at_once, empty, *more)


def test_a_long_query_keeps_a_response_that_thinks():
    thought = response("<think>3*3=9</think>9", 9, True, thinking="closed")
    longer = response("<think>3+3+3=9</think>9", 11, True, thinking="closed")
    long, short = pairs((2, 0), (2, 2))
    labels = label_queries([lucky(0, longer, thought), long[1]], short, LeakGuard())
    assert labels.chosen[0].record()["response"] == thought.text
    assert labels.dropped == {}


def test_a_long_query_of_which_nothing_right_thinks_is_left_out_and_counted(tmp_path):
    long, short = pairs((2, 0), (2, 2), (2, 0))
    labels = label_queries([lucky(0, WRONG), *long[1:]], short, LeakGuard())
    assert [(r.query.index, r.pattern) for r in labels.chosen] == [
        (1, "short"),
        (2, "long"),
    ]
    table = label_report.table(labels, LeakGuard())
    assert "1  are 'long', but no right response of Long thinks" in table
    # A thought that is not properly closed is no response, but it is a thought.
    unclosed = response("<think>3*3=9 \\boxed{9}", 9, True, thinking="open")
    labels = label_queries([lucky(0, unclosed), *long[1:]], short, LeakGuard())
    assert "response" not in labels.chosen[0].record()
    assert any("1 queries have no response" in note for note in labels.notes)


def test_responses_without_any_thinking_are_refused_with_what_to_do(tmp_path):
    _, short = pairs((2, 0), (2, 2))
    stripped = [candidate(0, RIGHT, RIGHT), candidate(1, RIGHT, RIGHT)]
    path = tmp_path / "c.jsonl"
    with pytest.raises(RpamError, match="none of Long's right responses") as error:
        write(path, label_queries(stripped, short, LeakGuard()))
    for advice in ("think_end_token", "--think-open", "--prompts-only"):
        assert advice in str(error.value)
    assert not list(tmp_path.iterdir())
    write(path, label_queries(stripped, short, LeakGuard(), responses=False))
    queries = read_calibration(path).queries
    assert [(q.pattern, q.response) for q in queries] == [
        ("long", None),
        ("short", None),
    ]


def test_an_answer_in_an_opened_block_is_kept_without_the_block():
    long, _ = pairs((2, 2), (2, 0))
    said = response("<think>\n9", 2, True, thinking="answered")
    labels = label_queries(long[:1], [candidate(0, said, said)], LeakGuard())
    assert labels.chosen[0].record()["response"] == "9"


def test_other_brackets_are_thoughts_too():
    query = SampledQuery(
        index=0,
        question="?",
        messages=(),
        responses=(response("[THINK]3*3[/THINK]9", 9, True, thinking="closed"),),
    )
    assert Summary.of(query, Markers("[THINK]", "[/THINK]")).thoughtful == 1
    assert Summary.of(query).thoughtful == 0


def test_without_token_counts_the_fewest_characters_count():
    query = candidate(
        0, response("long one", None, True), response("short", None, True)
    )
    assert query.summary.best.text == "short"
    assert query.summary.tokens is None


def test_labels_are_in_the_order_of_the_data_set():
    long, short = pairs((2, 0), (2, 2), (0, 0), (1, 0), (0, 1))
    labels = label_queries(long[::-1], short, LeakGuard())
    assert [(r.query.index, r.pattern) for r in labels.chosen] == [
        (0, "long"),
        (1, "short"),
        (3, "long"),
        (4, "short"),
    ]
    assert labels.dropped == {"neither model solves them": 1}


def test_what_only_one_file_has_is_left_out_and_counted():
    long, short = pairs((2, 0), (2, 2), (2, 0))
    labels = label_queries(long[:2], short[1:], LeakGuard())
    assert [r.query.index for r in labels.chosen] == [1]
    assert labels.dropped == {"only one file has them": 2}


def test_repeated_questions_count_once():
    long, short = pairs((2, 0), (2, 2))
    twin = candidate(5, WRONG, WRONG, question="question 0")
    labels = label_queries([twin, *long], short, LeakGuard())
    assert labels.labelled[0].pattern == "long"
    assert labels.dropped == {"repeat a question in Long's file": 1}


def test_leaks_are_left_out_and_named():
    guard = LeakGuard()
    guard.add("math500", ["Question 1?"])
    labels = label_queries(*pairs((2, 0), (2, 2), (2, 2)), guard)
    assert [r.query.index for r in labels.chosen] == [0, 2]
    assert labels.dropped == {"stand in the evaluation set math500": 1}
    assert "leak guard: 1 queries stand in math500 (1)" in label_report.table(
        labels, guard
    )


def test_sizes_and_balance():
    long, short = pairs(*[(2, 0)] * 10, *[(2, 2)] * 4)
    every = label_queries(long, short, LeakGuard())
    assert [len(every.of(p)) for p in ("long", "short")] == [10, 4]
    balanced = label_queries(long, short, LeakGuard(), balance=True)
    assert [len(balanced.of(p)) for p in ("long", "short")] == [4, 4]
    assert balanced.dropped == {"more 'long' than asked for": 6}
    three = label_queries(long, short, LeakGuard(), per_pattern=3)
    assert [len(three.of(p)) for p in ("long", "short")] == [3, 3]
    again, other = (
        label_queries(long, short, LeakGuard(), balance=True, seed=s).chosen
        for s in (0, 1)
    )
    assert again == balanced.chosen != other


def test_other_words_and_lost_grades_are_noted():
    long, short = pairs((2, 0), (2, 2))
    lost = candidate(2, RIGHT, response("?", 1, None))
    asked = {"role": "user", "content": "question 2, please"}
    other = dataclasses.replace(candidate(2, RIGHT, WRONG), messages=(asked,))
    labels = label_queries([*long, lost], [*short, other], LeakGuard())
    assert any(
        "1 queries were put to the models in different" in n for n in labels.notes
    )
    assert "1 lost grades count as not correct" in labels.notes
    assert labels.chosen[-1].record()["prompt"] == "question 2"


def test_the_calibration_file_is_one_the_merge_reads(tmp_path):
    path = tmp_path / "c.jsonl"
    write(path, label_queries(*pairs((2, 1), (2, 2)), LeakGuard()))
    queries = read_calibration(path).queries
    assert [q.pattern for q in queries] == ["long", "short"]
    assert [q.response for q in queries] == ["<think>t</think>r", "r"]
    first = json.loads(path.read_text().splitlines()[0])
    assert first == {
        "prompt": "question 0",
        "pattern": "long",
        "response": "<think>t</think>r",
        "long_accuracy": 1.0,
        "short_accuracy": 0.5,
        "long_tokens": 5.0,
        "short_tokens": 4.5,
        "source": {"level": 0},
    }
    assert list(tmp_path.iterdir()) == [path]


def test_conversations_stay_conversations(tmp_path):
    turns = ({"role": "system", "content": "S"}, {"role": "user", "content": "A?"})
    long, short = (
        [dataclasses.replace(c, messages=turns) for c in side]
        for side in pairs((2, 0), (2, 2))
    )
    path = tmp_path / "c.jsonl"
    write(path, label_queries(long, short, LeakGuard()))
    assert read_calibration(path).queries[0].conversation == list(turns)


@pytest.mark.parametrize(
    ("rows", "pattern", "advice"),
    [
        (((2, 2), (0, 2)), "long", "sample harder queries"),
        (((2, 0), (2, 1)), "short", "sample easier queries"),
    ],
)
def test_a_set_of_one_pattern_is_not_written(tmp_path, rows, pattern, advice):
    path = tmp_path / "c.jsonl"
    with pytest.raises(RpamError, match=f"no query is labelled '{pattern}'") as error:
        write(path, label_queries(*pairs(*rows), LeakGuard()))
    assert advice in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_table_shows_patterns_accuracies_and_tokens():
    labels = label_queries(*pairs((2, 0), (1, 0), (2, 2), (0, 0)), LeakGuard())
    table = label_report.table(labels, LeakGuard())
    rows = [line.split() for line in table.splitlines()]
    assert ["long", "2", "75.0%", "0.0%", "4.8", "4.0"] in rows
    assert ["short", "1", "100.0%", "100.0%", "5.0", "5.0"] in rows
    assert "1  neither model solves them" in table


def test_shares_by_a_field():
    labels = label_queries(*pairs((2, 0), (2, 2), (2, 2), (2, 2)), LeakGuard())
    rows = [
        line.split() for line in label_report.table_by(labels, "level").splitlines()
    ]
    assert rows == [
        ["level", "queries", "short"],
        ["0", "2", "50%"],
        ["1", "2", "100%"],
    ]
    with pytest.raises(RpamError, match="Did you mean 'level'"):
        label_report.table_by(labels, "levels")


def test_the_picture_is_drawn(tmp_path):
    label_report.plot(
        tmp_path / "p.png", label_queries(*pairs((2, 0), (2, 2)), LeakGuard())
    )
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
