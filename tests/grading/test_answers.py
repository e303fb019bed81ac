"""Which answers are right, and which only look like it."""

from __future__ import annotations

import json

import pytest

from helpers.paths import ROOT
from rpam_mergekit.grading.answers import Gold, is_correct, quick_verdict
from rpam_mergekit.grading.responses import Markers, final_answers, thinking
from rpam_mergekit.questions.benchmarks import PRESETS
from rpam_mergekit.questions.load import load_questions
from rpam_mergekit.questions.rows import Dataset

DATA = ROOT.parent / "shared" / "data"
BENCHMARKS = {
    "gsm8k": "gsm8k_test",
    "math500": "math500",
    "aime24": "aime24",
    "aime25": "aime25",
    "minerva": "minerva",
    "olympiadbench": "olympiadbench",
}

RIGHT = [
    ("18", "18.0"),
    ("18", "$18$"),
    ("18", r"\$18.00"),
    ("1000", "1,000"),
    ("12345", r"12{,}345"),
    ("0.5", r"\frac{1}{2}"),
    ("0.5", "1/2"),
    (r"\frac{1}{2}", ".5"),
    (r"\frac12", r"\dfrac{1}{2}"),
    (r"-\frac12", r"\frac{-1}{2}"),
    (r"\frac{3}{2}", r"1\frac{1}{2}"),
    (r"\frac{1}{3}", "0.333333"),
    ("50%", "50"),
    (r"50\%", "0.5"),
    ("4.5e33", r"4.5\times10^{33}"),
    (r"1.6\times10^{-19}", "1.60e-19"),
    ("10^{100}", "1e100"),
    ("3", r"\frac{6}{2}"),
    ("3", "1+2"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"3\sqrt{13}", r"\sqrt{117}"),
    (r"\frac{5}{6}", r"\frac{1}{2}+\frac{1}{3}"),
    ("10", r"\binom{5}{2}"),
    ("1024", "2^{10}"),
    ("x^2-1", "(x-1)(x+1)"),
    (r"\frac{x}{x+1}", r"1-\frac{1}{x+1}"),
    ("-(x-1)", "1-x"),
    (r"\frac{5\%}{2}", "0.025"),
    (r"\sin^2 x", r"1-\cos^2 x"),
    ("5", "x=5"),
    ("x=5", "5"),
    ("y=2x+3", "2x+3"),
    ("p-q", "-q+p"),
    ("1,2", "2, 1"),
    ("1,-2", r"-2 \text{ and } 1"),
    (r"\pm 2", "2,-2"),
    (r"\{2,3\}", "3,2"),
    ("(3,2)", r"\left(3, 2\right)"),
    ("(3,2)", "3,2"),
    ("(1,2),(3,4)", "(3,4),(1,2)"),
    (r"\left[\frac{1}{2},8\right]", "[0.5, 8]"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"\text{Evelyn}", "evelyn"),
    (r"\text{even}", "Even."),
    ("(C)", r"\text{C}"),
    (r"90^\circ", "90"),
    ("5", r"5\text{ cm}"),
    (r"12\text{ inches}", r"1\text{ foot}"),
    (r"5\text{ km}", r"5000 \mathrm{~m}"),
    (r"864 \mbox{ inches}^2", r"864\text{ square inches}"),
    (r"864 \mbox{ inches}^2", r"6\text{ ft}^2"),
    ("5 apples", "5"),
    ("5 apples", "5 apple"),  # no units that pint knows
    ("5 minutes", "5 Minutes"),  # pint knows the first only
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("4210_{5}", "4210"),
    (r"\infty", r"+\infty"),
]

# Each is wrong, and close: signs, units, off by one, order, brackets, forms.
NEAR_MISSES = [
    ("18", "-18"),
    ("-7", "7"),
    ("17", "71"),
    ("18", "19"),
    ("18", "17"),
    ("18", "18.1"),
    ("1000", "999"),
    ("1,000", "1"),
    ("12345", "12,354"),
    ("135", "1,35"),
    ("2", "2.0000001"),
    ("2", "1.9999999"),
    ("0.999", "1"),
    (r"\frac{1}{2}", "2"),
    ("1/2", "2/1"),
    (r"-\frac12", r"\frac12"),
    (r"\frac{1}{3}", "0.33"),
    (r"\frac{1}{3}", "0.333334"),
    (r"\frac{3}{2}", r"1\frac{1}{3}"),
    ("50", "0.5"),
    (r"5\%", "0.5"),
    (r"5\%", "500"),
    (r"\sqrt{0.6}", r"62.5\cdot 1\%"),
    (r"\log 2", r"\log 3"),
    (r"10^{-20}\pi", r"2\cdot 10^{-20}\pi"),
    ("4.5e33", r"4.5\times10^{32}"),
    (r"1.6\times10^{-19}", r"9.1\times10^{-31}"),
    ("0.0000042", "0.0000041"),
    ("10^{100}", "10^{10}"),
    ("1024", "2^{9}"),
    (r"2\sqrt2", "2.828"),
    (r"2\sqrt{2}", r"\sqrt{6}"),
    (r"3\sqrt{13}", r"13\sqrt{3}"),
    (r"\frac{\pi}{4}", "0.785"),
    (r"\frac{5}{6}", r"\frac{1}{2}+\frac{1}{4}"),
    ("10", r"\binom{5}{1}"),
    ("p-q", "q-p"),
    ("a+b", "a-b"),
    ("x^2-1", "(x-1)^2"),
    ("x^2+1", "x^2+2"),
    (r"\frac{x}{x+1}", r"1+\frac{1}{x+1}"),
    (r"\sin x", r"\cos x"),
    ("4", "4x"),
    ("6+9i", "9+6i"),
    ("y=2x+3", "x=2y+3"),
    ("y=2x+3", "2x+y+3=0"),
    ("x=5", "y=5"),
    ("f(x)=x", "f(x)=2-x"),
    ("x=1, y=2", "x=2, y=1"),
    (r"x\le5", "x<5"),
    ("x<5", "x>5"),
    ("1,3,5", "1,3"),
    ("1,3", "1,3,5"),
    ("2,3", "2,3,3"),
    ("16,3,1,1", "16,3,1"),
    (r"\pm 2", "2"),
    ("3", r"3 \text{ or } 4"),
    ("(3,2)", "(2,3)"),
    ("(3,2)", "2,3"),
    ("(3,2)", r"\{2,3\}"),
    (r"\{2,3\}", "(3,2)"),
    ("(1,2)", "[1,2]"),
    ("[1,2]", "1,2"),
    ("(1,2,3)", "(1,3,2)"),
    ("(1,2),(3,4)", "(2,1),(3,4)"),
    ("(1,2),(3,4)", "(1,3),(2,4)"),
    (r"(2,\infty)", r"[2,\infty)"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty,2]\cup(3,\infty)"),
    (r"\infty", r"-\infty"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\text{even}", r"\text{odd}"),
    (r"\text{Evelyn}", r"\text{Carla}"),
    (r"\text{June 20}", r"\text{June 21}"),
    (r"5\text{ cm}", r"5\text{ m}"),
    (r"5\text{ km}", r"5\text{ hours}"),
    (r"12\text{ inches}", r"12\text{ feet}"),
    (r"10\text{ cm}^2", r"10\text{ cm}"),
    ("5 apples", "5 oranges"),
    ("5 apples", "6 apple"),
    (r"\$5", "5 cents"),
    (r"90^\circ", r"90\text{ radians}"),
    (r"3\sqrt{2}\text{ cm}", r"3\sqrt{2}\text{ m}"),
    ("4210_{5}", "4210_{6}"),
    ("10:30", "10:31"),
    ("3:2", "2:3"),
    ("0", r"\emptyset"),
    ("", "5"),
    ("5", ""),
]


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_right_in_another_form(gold, answer):
    assert is_correct(Gold(values=(gold,)), [answer])


@pytest.mark.parametrize(("gold", "answer"), NEAR_MISSES)
def test_near_misses_are_wrong(gold, answer):
    assert not is_correct(Gold(values=(gold,)), [answer])


@pytest.mark.parametrize(("gold", "answer"), [*RIGHT, *NEAR_MISSES])
def test_the_quick_verdict_is_the_same(gold, answer):
    quick = quick_verdict(Gold(values=(gold or "x",)), [answer])
    assert quick in (None, is_correct(Gold(values=(gold,)), [answer]))


def test_there_are_enough_near_misses():
    assert len(set(NEAR_MISSES)) >= 60


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("It is 5.", True),
        ("Then she has $5 left", True),
        (r"So we get $x = \frac{10}{2}$", True),
        ("It is 6.", False),
        ("It is 5, no, 6.", False),
        ("Nobody knows it", False),
    ],
)
def test_an_answer_in_a_sentence(answer, right):
    assert is_correct(Gold(values=("5",)), [answer]) == right


def test_several_values_come_in_any_order_and_all_of_them():
    gold = Gold(values=("-3", "0", r"\frac{1}{2}"))
    assert is_correct(gold, ["0.5, 0, -3"])
    assert is_correct(gold, [r"\{0, -3, \frac12\}"])
    assert is_correct(gold, ["0", "-3", "1/2"])
    assert not is_correct(gold, ["0, -3"])
    assert not is_correct(gold, ["0, -3, 1/2, 1"])
    assert not is_correct(gold, ["0, -3, -3"])


def test_several_large_values_may_have_their_thousands_set_off():
    gold = Gold(values=("2500", "7500"))
    assert is_correct(gold, ["2,500, 7,500"])
    assert is_correct(gold, ["7500 and 2500"])
    assert not is_correct(gold, ["2,500, 7,501"])


def test_the_last_answer_counts():
    gold = Gold(values=("5",))
    assert is_correct(gold, ["4", "5"])
    assert not is_correct(gold, ["5", "4"])
    assert not is_correct(gold, [])


def test_a_tolerance_is_absolute():
    gold = Gold(values=("4.2",), tolerance=0.1, unit="%")
    assert is_correct(gold, ["4.3"])
    assert is_correct(gold, ["4.1"])
    assert not is_correct(gold, ["4.31"])


def test_a_relative_tolerance_is_for_decimals_only():
    measured = Gold(values=("4.5e33",), relative_tolerance=0.01)
    assert is_correct(measured, [r"4.53 \times 10^{33}"])
    assert not is_correct(measured, [r"4.56 \times 10^{33}"])
    assert not is_correct(Gold(values=("200",), relative_tolerance=0.01), ["201"])


def test_the_golds_own_unit_counts():
    gold = Gold(values=(r"\frac{600}{7}",), unit="km/h")
    assert is_correct(gold, [r"\frac{600}{7}"])
    assert is_correct(gold, [r"\frac{600}{7} \text{ km/h}"])
    assert not is_correct(gold, [r"\frac{600}{7} \text{ m/s}"])
    assert is_correct(Gold(values=("45",), unit="minute"), [r"0.75\text{ hours}"])


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", True),
        ("(B)", True),
        ("b", True),
        ("B.", True),
        (r"\text{B}", True),
        ("Option B", True),
        ("B) 10^-4 eV", True),
        ("10^-4 eV", True),
        ("A", False),
        ("(C) 10^-4 eV", False),
        ("10^-11 eV", False),
        ("A or B", False),
        ("10^-9 eV", False),
    ],
)
def test_multiple_choice(answer, right):
    choices = ("10^-11 eV", "10^-4 eV", "10^-8 eV", "10^-9 eV")
    assert is_correct(Gold(values=("B",), choices=choices), [answer]) == right


needs_data = pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")


@needs_data
@pytest.mark.parametrize("preset", BENCHMARKS)
def test_every_gold_is_accepted_against_itself(preset):
    """Through the loader, a response that boxes it, and grading; no exceptions."""
    path = DATA / "benchmarks" / f"{BENCHMARKS[preset]}.jsonl"
    loaded = load_questions(Dataset(str(path), preset=preset))
    assert not loaded.notes
    refused = []
    for question in loaded.questions:
        answer = ", ".join(question.gold.values)
        text = f"<think>Let me see.</think>So it is $\\boxed{{{answer}}}$."
        answers = final_answers(thinking(text, Markers()), text)
        if not is_correct(question.gold, answers):
            refused.append((question.index, answer))
    assert refused == []


@needs_data
@pytest.mark.parametrize("preset", BENCHMARKS)
def test_hardly_a_gold_is_accepted_for_the_next_question(preset):
    """A grader that accepts anything would pass the test above."""
    path = DATA / "benchmarks" / f"{BENCHMARKS[preset]}.jsonl"
    golds = [
        q.gold for q in load_questions(Dataset(str(path), preset=preset)).questions
    ]
    golds = golds[:100]
    accepted = same = 0
    for gold, other in zip(golds, [*golds[1:], golds[0]], strict=True):
        accepted += is_correct(gold, [", ".join(other.values)])
        same += gold.values == other.values
    assert accepted <= same + 0.02 * len(golds)


@needs_data
def test_recorded_grades_of_real_responses_are_matched():
    """At least 89 of 90; the closing of the thinking is counted as it is."""
    agreed, states = 0, []
    for line in (DATA / "outputs" / "aime24.jsonl").read_text().splitlines():
        row = json.loads(line)
        gold = Gold(values=(row["gt"],))
        for text, score in zip(row["code"], row["score"], strict=True):
            found = thinking(text, Markers(), opened_by_prompt=True)
            states.append(found.state)
            agreed += is_correct(gold, final_answers(found, text)) == score
    assert agreed == 90
    counts = {state: states.count(state) for state in set(states)}
    assert counts == {"closed": 58, "wrong": 25, "open": 7}


def test_every_preset_shows_its_raw_row():
    for preset in PRESETS.values():
        assert '{"' in (preset.read.__doc__ or ""), preset.name
