"""The sample file: k responses per query of one model, graded; JSON Lines.

The first line is a header: format version, model, data set, sampling settings. Then
one query a line, appended when all its responses are graded::

    {"index": 0, "question": "...", "messages": [...], "gold": {...}, "source": {...},
     "responses": [{"text": "...", "tokens": 9, "finish": "stop", "thinking": "closed",
                    "correct": true, "seed": 1}, ...]}

and when every query asked for is there, ``{"finished": {"queries": 500, ...}}``. A file
without that last line is an unfinished run; the same command goes on with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rpam_mergekit.errors import RpamError
from rpam_mergekit.grading.answers import Gold

if TYPE_CHECKING:
    from filelock import BaseFileLock

FORMAT = 1
_MAGIC = "rpam_samples"
_NOT_COMPARED = ("software", "backend")


class Response(BaseModel):
    """One response of a model.

    tokens: generated tokens, the end token included, by the server's or tokenizer's
        count. finish: the finish reason, ``length`` where the limit cut it off.
    thinking: see `responses.Thinking`. correct: None if its grade was lost, with the
    reason in `problem`. seed: the one it was sampled with.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    text: str
    tokens: int | None = None
    finish: str | None = None
    thinking: str = "none"
    correct: bool | None = None
    problem: str | None = None
    seed: int | None = None


class SampledQuery(BaseModel):
    """A query with its responses."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    index: int
    question: str
    messages: tuple[dict[str, str], ...]
    gold: Gold | None = None
    source: dict[str, Any] = {}
    responses: tuple[Response, ...]

    @property
    def accuracy(self) -> float:
        """The share of correct responses; a lost grade counts as not correct."""
        return sum(r.correct is True for r in self.responses) / len(self.responses)

    @property
    def tokens(self) -> float | None:
        """The mean number of tokens, None if any is unknown."""
        counts = [r.tokens for r in self.responses]
        if any(count is None for count in counts):
            return None
        return sum(c for c in counts if c is not None) / len(counts)


class SampleWriter:
    """Appends to a sample file, and goes on with an unfinished one; a context manager.

    `done` holds the indices of the queries that the file has. A last line that was
    torn by a kill is cut off. Raises `RpamError` if the file is something else, was
    made with other settings, or is being written by another run.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = Path(path)
        self.done: set[int] = set()
        self.finished = False
        header = json.loads(json.dumps({_MAGIC: FORMAT, **header}))
        check_folder(self.path)
        self._lock = _locked(self.path)
        try:
            with _reporting(self.path):
                self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
                self._resume(header)
        except BaseException:
            self._lock.release()
            raise

    def _resume(self, header: dict[str, Any]) -> None:
        end = 0
        for number, record, end in _records(self.path):  # noqa: B007
            if number == 1:
                _compare(self.path, record, header)
            elif isinstance(record, dict) and "index" in record:
                self.done.add(record["index"])
                self.finished = False
            else:
                self.finished = isinstance(record, dict) and "finished" in record
        self._file.truncate(end)
        self._file.seek(end)
        if not end:
            self._write(header)

    def append(self, query: SampledQuery) -> None:
        """Write one query; it is on its way to disk when this returns."""
        record = query.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        # A lost grade is not the same as a grade that was never asked for.
        for written, response in zip(record["responses"], query.responses, strict=True):
            written["correct"] = response.correct
        self._write(record)
        self.done.add(query.index)

    def finish(self) -> None:
        """Mark the file as whole."""
        self._write({"finished": {"queries": len(self.done)}})
        self.finished = True

    def _write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"
        with _reporting(self.path):
            left = memoryview(line.encode("utf-8", "surrogatepass"))
            while left:
                left = left[self._file.write(left) :]

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with _reporting(self.path):
                os.fsync(self._file.fileno())
                self._file.close()
        finally:
            self._lock.release()


class SampleReader:
    """Reads a sample file line by line; iterating yields `SampledQuery`.

    header: the first line; after a whole iteration, `finished` says whether the run
    that wrote it was. Raises `RpamError` with file and line for what is no sample file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.finished = False
        first = next(_records(self.path), None)
        if first is None or not isinstance(first[1], dict) or _MAGIC not in first[1]:
            raise RpamError(f"{path}:1: not a sample file of mergekit-rpam.")
        self.header: dict[str, Any] = first[1]
        if self.header[_MAGIC] != FORMAT:
            raise RpamError(
                f"{path}:1: sample file format {self.header[_MAGIC]}, this version "
                f"reads {FORMAT}. Update rpam-mergekit."
            )

    def __iter__(self) -> Iterator[SampledQuery]:
        for number, record, _ in _records(self.path):
            if number == 1:
                continue
            self.finished = isinstance(record, dict) and "finished" in record
            if self.finished:
                continue
            try:
                yield SampledQuery.model_validate(record)
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(str(part) for part in first["loc"])
                raise RpamError(
                    f"{self.path}:{number}: {field}: {first['msg']}"
                ) from None


def _records(path: Path) -> Iterator[tuple[int, Any, int]]:
    """Yield line number, record and end position of every line but a torn last one."""
    end = 0
    with _reporting(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                yield number, json.loads(line), end
            except ValueError:
                raise RpamError(
                    f"{path}:{number}: not JSON. The file was damaged; remove that "
                    "line, or the file to sample anew."
                ) from None


def check_folder(path: Path) -> None:
    """Raise `RpamError` if the folder of an output file is not there."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise RpamError(f"--out: no folder {folder}. Make it first.")


def is_sample_file(path: str | Path) -> bool:
    """Return whether the file's first line is a header of ours."""
    with _reporting(Path(path)), open(path, "rb") as file:
        return f'"{_MAGIC}"'.encode() in file.readline(200)


def _compare(path: Path, found: Any, wanted: dict[str, Any]) -> None:
    """Raise `RpamError` with a finding for every setting that differs."""
    if not isinstance(found, dict) or _MAGIC not in found:
        raise RpamError(
            f"--out: {path} exists and is not a sample file of mergekit-rpam. It is "
            "left as it is; name another file."
        )
    _check_turns(path, found, wanted)
    old, new = flat(found), flat(wanted)
    differences = [
        f"{path}:1: {key}: the file was made with {old.get(key)!r}, this run has "
        f"{new.get(key)!r}."
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
        and not key.startswith(_NOT_COMPARED)
        and (key != "thinking.opening" or key in old)  # older files: `_check_turns`
    ]
    if differences:
        raise RpamError(
            *differences,
            "Samples of different settings are not mixed: run with the file's settings "
            "to go on with it, or give --out another file.",
        )


def _check_turns(path: Path, found: Any, wanted: dict[str, Any]) -> None:
    """Raise `RpamError` for an older file that whole turns cannot follow.

    Where prompts opened no thinking its responses are whole turns, too.
    """
    known = found.get("thinking") or {}
    if "opening" in known or "opening" not in wanted.get("thinking", {}):
        return
    if known.get("opened_by_prompt") is not False:
        raise RpamError(
            f"{path}:1: thinking: the file is of a version whose responses were no "
            "whole turns: they lack the opening of the thinking that stood in the "
            "prompt. It is read as before, but not gone on with: finish it by that "
            "version, or give --out another file."
        )


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level, keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _locked(path: Path) -> BaseFileLock:
    import filelock

    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    with _reporting(path):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise RpamError(
                f"--out: another run is writing {path}. Wait for it, or name another "
                "file."
            ) from None
    return lock


class _reporting:  # noqa: N801
    """Turns an `OSError` inside into an `RpamError` that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise RpamError(f"{self.path}: {reason}.") from error
