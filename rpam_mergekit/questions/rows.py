"""The raw rows of a data set: a JSONL file, or one of the Hub through `datasets`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpam_mergekit.errors import RpamError, refuse, suggestion
from rpam_mergekit.extras import needs
from rpam_mergekit.grading.responses import boxed

if TYPE_CHECKING:
    from rpam_mergekit.questions.benchmarks import Preset

MOST_FINDINGS = 20


@dataclass(frozen=True)
class Dataset:
    """Which rows to read, and how: `name` is a preset, a JSONL file or a Hub data set.

    `preset` names the preset whose rows these are; by default the one called `name`.
    """

    name: str
    preset: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    question_column: str | None = None
    answer_column: str | None = None


class UnusableRow(Exception):
    """A row without a question or an answer; the text says what is missing."""


def read_rows(
    dataset: Dataset, preset: Preset | None, presets: Iterable[str]
) -> tuple[list[dict[str, Any]], Callable[[int], str]]:
    """Return the rows, and a function from a row's number to where it stands.

    preset: the one whose rows these are; presets: the names of all, to suggest one.
    """
    path = Path(dataset.name)
    if path.suffix in (".jsonl", ".json") or path.is_file():
        rows, lines = read_lines(path, "--dataset")
        return rows, lambda index: f"{path}:{lines[index]}"
    if path.is_dir() or (preset and preset.name == dataset.name) or "/" in dataset.name:
        rows = _hub_rows(dataset, preset)
        return rows, lambda index: f"{dataset.name}, row {index}"
    raise RpamError(
        f"--dataset: '{dataset.name}' is no file, no preset and no Hub data set "
        f"(owner/name).{suggestion(dataset.name, presets)}"
    )


def read_lines(path: Path, option: str) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the objects of a JSONL file, and their line numbers.

    Raises `RpamError`, naming `option`, if the file cannot be read or a line is no
    JSON object.
    """
    rows, lines, problems = [], [], []
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    problems.append(
                        f"{path}:{number}: not JSON: {error.msg} at column "
                        f"{error.colno}"
                    )
                    continue
                if not isinstance(row, dict):
                    problems.append(
                        f"{path}:{number}: found a JSON {type(row).__name__}, expected "
                        "an object"
                    )
                    continue
                rows.append(row)
                lines.append(number)
    except FileNotFoundError:
        raise RpamError(
            f"{option}: no file {path} (looked for {path.absolute()})."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RpamError(f"{option}: cannot read {path}: {error}") from None
    refuse(problems[:MOST_FINDINGS])
    return rows, lines


def _hub_rows(dataset: Dataset, preset: Preset | None) -> list[dict[str, Any]]:
    with needs("sample"):
        import datasets

    name, configs = dataset.name, [dataset.config]
    split = dataset.split or (preset.split if preset else None)
    if preset is not None and preset.name == dataset.name:
        name = preset.path
        configs = configs if dataset.config else list(preset.configs)
    if split is None:
        raise RpamError(
            f"--split: say which split of {name} to read, for example --split train."
        )
    rows: list[dict[str, Any]] = []
    for config in configs:
        try:
            part = datasets.load_dataset(
                name, config, split=split, revision=dataset.revision
            )
        except Exception as error:
            raise RpamError(
                f"--dataset: cannot load {name}"
                f"{f', configuration {config}' if config else ''}, split {split}: "
                f"{type(error).__name__}: {error}"
            ) from None
        rows += [dict(row) for row in part]
    return rows


def column_of(row: Iterable[str], names: Iterable[str]) -> str | None:
    """Return the first of the names that a row has; its letters may be of any case."""
    plain = {key.strip().lower(): key for key in reversed(list(row))}
    return next(
        (key for name in names if (key := name if name in row else plain.get(name))),
        None,
    )


def gold_text(text: str) -> str:
    r"""Return the answer of a text that may hold a rationale.

    What follows the last ``####``, else the last ``\boxed{}``, else the whole.
    """
    if "####" in text:
        return text.rpartition("####")[2].strip()
    boxes = boxed(text)
    return (boxes[-1] if boxes else text).strip()
