"""Greedy responses of a model to word problems, graded, and kept on disk.

Used by evaluate.py. What a model has answered once is read from a file the next time,
as long as its weights and the problems are the same.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from mergekit.io import ShardedTensorIndex
from transformers import LogitsProcessor, LogitsProcessorList
from words import Problem

from rpam_mergekit.evaluate.compare import QueryFigures
from rpam_mergekit.formats.files import digest
from rpam_mergekit.grading.responses import (
    CLOSED,
    NONE,
    Markers,
    final_answers,
    thinking,
)

MOST_NEW_TOKENS = 80
BATCH = 64


@dataclass(frozen=True)
class Response:
    """A response without its end token, which `tokens` counts.

    opening: log odds of the first token that opens the thinking against any digit,
    where the response begins.
    """

    text: str
    tokens: int
    ended: bool
    opening: float


class Opening(LogitsProcessor):
    """Leaves the scores as they are, and keeps the log odds of the first token's."""

    def __init__(self, tokenizer) -> None:
        self.think = _first_token(tokenizer, "<think>")
        self.digits = [_first_token(tokenizer, str(digit)) for digit in range(10)]
        self.odds: list[float] = []

    def __call__(self, input_ids, scores):
        if not self.odds:
            digits = scores[:, self.digits].logsumexp(-1)
            self.odds = (scores[:, self.think] - digits).tolist()
        return scores


def _first_token(tokenizer, text: str) -> int:
    return tokenizer(text, add_special_tokens=False)["input_ids"][0]


@torch.inference_mode()
def respond(model, tokenizer, problems: Sequence[Problem]) -> list[Response]:
    """Return greedy responses of at most `MOST_NEW_TOKENS` tokens."""
    responses: list[Response] = []
    for first in range(0, len(problems), BATCH):
        chats = [
            [{"role": "user", "content": problem.question}]
            for problem in problems[first : first + BATCH]
        ]
        prompt = tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            return_dict=True,
            padding=True,
            return_tensors="pt",
            tokenizer_kwargs={"padding_side": "left"},  # responses start together
        )
        opening = Opening(tokenizer)
        output = model.generate(
            **prompt,
            do_sample=False,
            max_new_tokens=MOST_NEW_TOKENS,
            logits_processor=LogitsProcessorList([opening]),
        )[:, prompt["input_ids"].shape[1] :]
        for row, odds in zip(output.tolist(), opening.odds, strict=True):
            responses.append(_response(tokenizer, row, odds))
    return responses


def _response(tokenizer, row: list[int], odds: float) -> Response:
    ended = tokenizer.eos_token_id in row
    kept = row[: row.index(tokenizer.eos_token_id)] if ended else row
    return Response(tokenizer.decode(kept), len(kept) + ended, ended, round(odds, 3))


def grade(problem: Problem, response: Response) -> QueryFigures:
    """Return the figures of one response.

    It is right if it ends, gives the answer, and either answers at once or opens and
    closes its thinking once.
    """
    found = thinking(response.text, Markers(), opened_by_prompt=False)
    answers = final_answers(found, response.text) if found.final is not None else []
    right = response.ended and answers[-1:] == [problem.answer]
    return QueryFigures(
        accuracy=float(right and found.state in (NONE, CLOSED)),
        tokens=float(response.tokens),
        thinking=float(found.thinks),
        closed=float(found.state == CLOSED),
        cut_off=float(not response.ended),
        counts=(response.tokens,),
        source={"steps": problem.difficulty},
    )


def kept(path: Path, key: str, make: Callable[[], list[Response]]) -> list[Response]:
    """Return what `make` returns, or what it returned for the same key before."""
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] == key:
            return [Response(**row) for row in found["responses"]]
    responses = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"key": key, "responses": [asdict(response) for response in responses]}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=0) + "\n", encoding="utf-8")
    partial.replace(path)
    return responses


def key_of(folders: Sequence[Path], problems: Sequence[Problem]) -> str:
    """Return a digest of the weights in `folders`, and of the problems."""
    weights = [
        digest(sorted(folder / name for name in _weight_files(folder)))
        for folder in folders
    ]
    asked = [weights, [problem.question for problem in problems], MOST_NEW_TOKENS]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _weight_files(folder: Path) -> set[str]:
    return set(ShardedTensorIndex.from_disk(str(folder)).tensor_paths.values())
