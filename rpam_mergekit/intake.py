"""Sampled queries of any format: ours, lm-eval's or the minimal one, all graded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Set
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rpam_mergekit.errors import RpamError
from rpam_mergekit.foreign import ForeignQuery, read_foreign
from rpam_mergekit.grading import Grader
from rpam_mergekit.questions import Question
from rpam_mergekit.responses import Markers, thinking
from rpam_mergekit.samples import Response, SampledQuery, SampleReader, is_sample_file
from rpam_mergekit.sampling import Generated, graded


class Intake:
    """Sampled queries of any format, graded where they are not.

    options: of the command, see `cli.py`; with `regrade` our own files are graded
    anew. header: that of our files. finished: known once all queries have been read.
    """

    def __init__(
        self, path: Path, options: dict[str, Any], regrade: bool = False
    ) -> None:
        self.path = path
        self.options = options
        self.regrade = regrade
        self.finished = False
        self._ours = SampleReader(path) if is_sample_file(path) else None
        self.header: dict[str, Any] = {"model": None, "source": path.name}
        if self._ours is not None:
            self.header = dict(self._ours.header)
            del self.header["rpam_samples"]
        known = self.header.get("thinking", {})
        self.markers = markers_of(options, known)
        self.opened_by_prompt = options["opened_by_prompt"]
        if self.opened_by_prompt is None:
            self.opened_by_prompt = known.get("opened_by_prompt")
        if regrade:
            self.header["thinking"] = {
                "open": self.markers.open,
                "close": self.markers.close,
                "opened_by_prompt": self.opened_by_prompt,
            }

    async def queries(
        self, skip: Set[int] = frozenset()
    ) -> AsyncIterator[SampledQuery]:
        """Yield every query whose index is not in `skip`."""
        if self._ours is not None and not self.regrade:
            for query in self._ours:
                yield query
            self.finished = self._ours.finished
            return
        with grader_of(self.options) as grader:
            if self._ours is not None:
                for query in tqdm(self._ours, desc=self.path.name, unit="query"):
                    if query.index not in skip:
                        yield await self._regraded(query, grader)
                self.finished = self._ours.finished
                return
            tokenizer = tokenizer_of(self.options["tokenizer"])
            rows = [row for row in read_foreign(self.path) if row.index not in skip]
            for row in tqdm(rows, desc=self.path.name, unit="query"):
                yield await self._graded(row, grader, tokenizer)
        self.finished = True

    async def _regraded(self, query: SampledQuery, grader: Grader) -> SampledQuery:
        if query.gold is None:
            return query
        question = Question(
            index=query.index,
            question=query.question,
            messages=query.messages,
            gold=query.gold,
            source=query.source,
        )
        generated = [
            Generated(r.text, r.tokens, r.finish, r.seed) for r in query.responses
        ]
        return await graded(
            question, generated, grader, self.markers, self.opened_by_prompt
        )

    async def _graded(
        self, row: ForeignQuery, grader: Grader, tokenizer: Any
    ) -> SampledQuery:
        tokens = row.tokens
        if tokenizer is not None:
            tokens = tuple(
                len(tokenizer(text, add_special_tokens=False)["input_ids"])
                if count is None
                else count
                for text, count in zip(row.texts, tokens, strict=True)
            )
        common: dict[str, Any] = {
            "index": row.index,
            "question": row.question,
            "messages": row.messages,
            "source": row.source,
        }
        if row.gold is not None:
            generated = [
                Generated(text, count, finish, None)
                for text, count, finish in zip(
                    row.texts, tokens, row.finishes, strict=True
                )
            ]
            question = Question(gold=row.gold, **common)
            return await graded(
                question, generated, grader, self.markers, self.opened_by_prompt
            )
        responses = tuple(
            Response(
                text=text,
                tokens=count,
                finish=finish,
                correct=right,
                thinking=thinking(text, self.markers, self.opened_by_prompt).state,
            )
            for text, count, finish, right in zip(
                row.texts, tokens, row.finishes, row.correct, strict=True
            )
        )
        return SampledQuery(responses=responses, **common)


def grader_of(options: dict[str, Any]) -> Grader:
    return Grader(options["graders"], options["grading_time_limit"])


def tokenizer_of(name: str | None) -> Any:
    if name is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise RpamError(f"--tokenizer: cannot load {name}: {error}") from None


def markers_of(
    options: dict[str, Any], known: Mapping[str, Any] | None = None
) -> Markers:
    """Return the markers that the options name, else those of a header, else ours."""
    chosen = []
    for name, usual in (("open", Markers.open), ("close", Markers.close)):
        value = options[f"think_{name}"]
        if value is None:
            value = (known or {}).get(name, usual)
        if not value:
            raise RpamError(f"--think-{name}: a marker cannot be empty.")
        chosen.append(value)
    return Markers(*chosen)
