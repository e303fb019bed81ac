"""Sampled queries of any format, all graded: ours, lm-eval's or the minimal one.

lm-eval writes its files with ``--log_samples``. The minimal format is a JSONL with the
query as in a data set file (`questions.py`) and its responses, as texts or objects::

    {"question": "What is 7 + 5?", "answer": "12", "responses": ["12", "It is 13."]}
    {"prompt": "...", "responses": [{"text": "...", "tokens": 310, "correct": true}]}

`correct` (or a list ``"correct": [true, false]``) is believed where there is no answer
to grade by.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.samples import (
    Response,
    SampledQuery,
    SampleReader,
    is_sample_file,
)
from rpam_mergekit.grading.brackets import (
    begun_turn,
    closes_unopened,
    markers_in,
    read_turn,
    usual_opening,
)
from rpam_mergekit.grading.responses import has_ended, without_end
from rpam_mergekit.grading.workers import Grader
from rpam_mergekit.questions.load import (
    Question,
)
from rpam_mergekit.sampling.other_formats import ForeignQuery, read_foreign
from rpam_mergekit.sampling.request import GradingOptions
from rpam_mergekit.sampling.run import Generated, graded
from rpam_mergekit.sampling.turns import end_tokens, markers_of, thinking_header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GradedSamples:
    """Sampled queries of any format, graded where they are not; all whole turns.

    With `regrade` our own files are graded anew. header: that of our files.
    finished: known once all queries have been read.
    markers, opening: how the model of this file thinks, and how its prompts begin it:
    what the header says, else what options and responses tell.
    """

    def __init__(
        self, path: Path, options: GradingOptions, regrade: bool = False
    ) -> None:
        self.path = path
        self.options = options
        self.regrade = regrade
        self.finished = False
        self._tokenizer = tokenizer_of(options.tokenizer)
        self._ends = end_tokens(self._tokenizer) if self._tokenizer else ()
        self._ours = SampleReader(path) if is_sample_file(path) else None
        self._rows: list[ForeignQuery] = []
        self.header: dict[str, Any] = {"model": None, "source": path.name}
        if self._ours is not None:
            self.header = dict(self._ours.header)
            del self.header["rpam_samples"]
        else:
            self._rows = list(read_foreign(path))
        known = self.header.get("thinking") or self._brackets()
        self.markers = markers_of(options, known)
        self.opening = self._opening(known)
        if regrade:
            self.header["thinking"] = thinking_header(self.markers, self.opening)

    def _brackets(self) -> dict[str, str]:
        """Return the brackets of a file without a header, as a header has them."""
        found = markers_in(text for row in self._rows for text in row.texts)
        return {"open": found.open, "close": found.close} if found else {}

    def _opening(self, known: Mapping[str, Any]) -> str | None:
        """Return the opening of the prompts, None if it is not known.

        What --opened-by-prompt says is meant for files that do not know it. One of
        which no response closes thinking that it has not opened is not meant.
        """
        opening: str | None = known.get("opening")
        if opening is not None:
            return opening
        said = known.get("opened_by_prompt")  # of a file without openings
        if said is None:
            said = self.options.opened_by_prompt
            if said and not self._closes_unopened("opening" in known):
                said = None
        if said is None:
            return None
        return usual_opening(self.markers) if said else ""

    def _closes_unopened(self, whole: bool) -> bool:
        """Tell whether a response closes what the prompt must have opened.

        In a file of `whole` turns of which the opening is not known, any closing may.
        """
        texts = (text for row in self._rows for text in row.texts)
        if self._ours is not None:
            texts = (r.text for query in self._ours for r in query.responses)
        return any(
            self.markers.close in text if whole else closes_unopened(text, self.markers)
            for text in texts
        )

    async def queries(
        self, skip: Set[int] = frozenset()
    ) -> AsyncIterator[SampledQuery]:
        """Yield every query whose index is not in `skip`."""
        if self._ours is not None and not self.regrade:
            for query in self._ours:
                yield self._whole(query)
            self.finished = self._ours.finished
            return
        with grader_of(self.options) as grader:
            if self._ours is not None:
                for query in tqdm(self._ours, desc=self.path.name, unit="query"):
                    if query.index not in skip:
                        yield await self._regraded(query, grader)
                self.finished = self._ours.finished
                return
            rows = [row for row in self._rows if row.index not in skip]
            for row in tqdm(rows, desc=self.path.name, unit="query"):
                yield await self._graded(row, grader)
        self.finished = True

    def refuse_unfinished(self, queries: int, partial: bool) -> None:
        """Raise `RpamError` if the run has not finished, unless `partial` allows it.

        To be asked when the `queries` there are have been read.
        """
        if not self.finished and not partial:
            raise RpamError(
                f"{self.path}: the run that writes it has not finished ({queries} "
                "queries so far). Run its command again to finish it, or give "
                "--partial to take what is there."
            )

    def _whole(self, query: SampledQuery) -> SampledQuery:
        """Return a query of ours with whole turns; states and grades stay."""
        responses = tuple(
            r.model_copy(update={"text": self._turn(r.text)}) for r in query.responses
        )
        return query.model_copy(update={"responses": responses})

    def _turn(self, text: str) -> str:
        text = without_end(text, self.markers, self._ends)
        return begun_turn(text, self.opening, self.markers)

    async def _regraded(self, query: SampledQuery, grader: Grader) -> SampledQuery:
        if query.gold is None:
            return self._whole(query)
        question = Question(
            index=query.index,
            question=query.question,
            messages=query.messages,
            gold=query.gold,
            source=query.source,
        )
        generated = [
            Generated(self._turn(r.text), r.tokens, r.finish, r.seed)
            for r in query.responses
        ]
        return await graded(question, generated, grader, self.markers, self.opening)

    async def _graded(
        self,
        row: ForeignQuery,
        grader: Grader,
    ) -> SampledQuery:
        tokens, tokenizer = row.tokens, self._tokenizer
        if tokenizer is not None:
            tokens = tuple(
                len(tokenizer(text, add_special_tokens=False)["input_ids"])
                if count is None
                else count
                for text, count in zip(row.texts, tokens, strict=True)
            )
        turns = [self._turn(text) for text in row.texts]
        common: dict[str, Any] = {
            "index": row.index,
            "question": row.question,
            "messages": row.messages,
            "source": row.source,
        }
        if row.gold is not None:
            generated = [
                Generated(turn, count, finish, None)
                for turn, count, finish in zip(turns, tokens, row.finishes, strict=True)
            ]
            question = Question(gold=row.gold, **common)
            return await graded(question, generated, grader, self.markers, self.opening)
        responses = tuple(
            Response(
                text=turn,
                tokens=count,
                finish=finish,
                correct=right,
                thinking=read_turn(
                    turn, self.opening, self.markers, has_ended(finish)
                ).state,
            )
            for turn, count, finish, right in zip(
                turns, tokens, row.finishes, row.correct, strict=True
            )
        )
        return SampledQuery(responses=responses, **common)


def grader_of(options: GradingOptions) -> Grader:
    return Grader(options.graders, options.grading_time_limit)


def tokenizer_of(name: str | None) -> PreTrainedTokenizerBase | None:
    if name is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise RpamError(f"--tokenizer: cannot load {name}: {error}") from None
