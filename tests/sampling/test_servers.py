"""Servers that answer otherwise: every engine's form gives the turn that was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.engines import FORMS, Engine, serving
from helpers.paths import QUICKSTART
from rpam_mergekit.formats.samples import Response, SampleReader
from rpam_mergekit.sampling.request import SampleRequest
from rpam_mergekit.sampling.run import Tally
from rpam_mergekit.sampling.sample import sample

LONG = QUICKSTART / "long"
THOUGHT, ANSWERED = "<think>\n6*6=36\n</think>\n\n36", "36"


class Run:
    """What a run on a server gave: responses in order, notes, figures."""

    def __init__(self, path: Path, tally: Tally, notes: list[str]) -> None:
        self.header = SampleReader(path).header
        queries = sorted(SampleReader(path), key=lambda query: query.index)
        self.responses: list[Response] = [r for q in queries for r in q.responses]
        self.tally, self.notes = tally, "\n".join(notes)

    @property
    def texts(self) -> list[str]:
        return [response.text for response in self.responses]


@pytest.fixture
def ask(tmp_path):
    """Return a function that samples an engine; one query and response by default."""

    def call(engine: Engine, queries: int = 1, question: str = "6*6", **options) -> Run:
        data, out = tmp_path / "q.jsonl", tmp_path / "s.jsonl"
        rows = [{"question": f"{question}+{n}-{n}=", "answer": "36"} for n in range(9)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[:queries]))
        out.unlink(missing_ok=True)
        notes: list[str] = []
        defaults = {"samples": 1, "graders": 1, "concurrency": 1, "retries": 0}
        with serving(engine):
            options = {"model": "m", "base_url": (engine.url,), **options}
            request = SampleRequest(
                dataset=str(data), out=out, **{**defaults, **options}
            )
            tally = sample(request, notes.append)
        return Run(out, tally, notes)

    return call


@pytest.mark.parametrize("name", FORMS)
def test_a_split_turn_becomes_the_canonical_turn_again(ask, name):
    found = ask(Engine(texts=[THOUGHT], form=FORMS[name]), opened_by_prompt=False)
    (response,) = found.responses
    assert response.text == THOUGHT
    assert (response.thinking, response.correct) == ("closed", True)
    assert "1 responses it was put back between the thinking markers" in found.notes


@pytest.mark.parametrize("name", FORMS)
def test_an_answer_given_at_once_stays_one(ask, name):
    """Also where a parser has taken it for thinking (vllm-project/vllm#13125)."""
    found = ask(
        Engine(
            texts=[ANSWERED],
            form=FORMS[name],
            prompt=lambda question: f"<|user|>{question}<|end|><|assistant|>",
        ),
        tokenizer=str(LONG),
    )
    (response,) = found.responses
    assert response.text == ANSWERED
    assert (response.thinking, response.correct) == ("none", True)
    parser = name in ("vLLM", "vLLM 0.11", "SGLang")
    assert ("1 responses came as reasoning without content" in found.notes) == parser
    assert ("they are taken for answers given at once" in found.notes) == parser
