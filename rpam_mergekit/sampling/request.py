"""What a run of sampling, grading or labelling is asked to do, as typed values.

The fields have the names and the defaults of the command line's options, which takes
them from here; what they change is said there by `--help` and here by the docstrings.
This module imports nothing heavy.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

from rpam_mergekit.errors import refuse

Location: TypeAlias = str | Path
# Takes a message for the user, a whole line of text.
Say: TypeAlias = Callable[[str], object]
# Where messages go unless the caller names another place: to stderr, unless the
# program has set up its logging.
log: Say = logging.getLogger("rpam_mergekit").warning

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Numbers of all requests; None is always allowed where it is the default.
AT_LEAST = {
    "batch_size": 1,
    "concurrency": 1,
    "draws": 100,
    "graders": 1,
    "grading_time_limit": 0.1,
    "limit": 1,
    "max_tokens": 1,
    "per_pattern": 1,
    "retries": 0,
    "samples": 1,
    "seed": 0,
    "temperature": 0,
    "top_k": 1,
}
_SECRET = re.compile(
    r"api.?key|secret|password|authorization|(access|auth).?token", re.IGNORECASE
)
ABOVE_ZERO = ("requests_per_minute", "timeout", "top_p")


@dataclass(frozen=True, kw_only=True)
class ThinkingOptions:
    """How responses think, where neither chat template nor file says it.

    think_open, think_close: the markers around the thinking. opened_by_prompt: whether
    the chat template already opens the thinking; None if that is not known.
    """

    think_open: str | None = None
    think_close: str | None = None
    opened_by_prompt: bool | None = None


@dataclass(frozen=True, kw_only=True)
class GradingOptions(ThinkingOptions):
    """How responses are graded and counted.

    graders: processes that grade, None for half the cores. grading_time_limit: seconds
    after which a grade is given up. tokenizer: folder or Hub name of the one that
    counts tokens where a file (or a server) does not.
    """

    graders: int | None = None
    grading_time_limit: float = 10.0
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        """Raise `RpamError` for all numbers and names that cannot be."""
        findings: list[str] = []
        for name in ("base_url", "exclude"):  # one text is one of them
            if hasattr(self, name):
                value = getattr(self, name)
                several = (value,) if isinstance(value, str) else tuple(value)
                object.__setattr__(self, name, several)
        for name, value in vars(self).items():
            if value is None:
                continue
            numeric = name in AT_LEAST or name in ABOVE_ZERO
            if numeric and not isinstance(value, int | float):
                findings.append(f"{name}: found {value!r}, expected a number.")
                continue
            if name in AT_LEAST and value < AT_LEAST[name]:
                findings.append(
                    f"{name}: found {value}, expected at least {AT_LEAST[name]}."
                )
            if name in ABOVE_ZERO and value <= 0:
                findings.append(f"{name}: found {value}, expected more than 0.")
            if name == "top_p" and value > 1:
                findings.append(f"{name}: found {value}, expected at most 1.")
            if name == "dtype" and value not in DTYPES:
                known = ", ".join(DTYPES)
                findings.append(f"{name}: found '{value}', expected one of {known}.")
        refuse(findings)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(GradingOptions):
    """Which queries are asked, and how responses are drawn.

    dataset: a preset, a JSONL file or a Hub data set; preset, config, split,
    dataset_revision, question_column, answer_column: how its rows are read.
    limit: how many of its queries are asked, shuffle: seed of a random order.
    system, instruction: a system message, and text after each question ('' for none,
    None for the preset's).
    samples: responses per query, drawn by temperature, top_p, top_k, max_tokens, seed.

    With base_url, servers that speak the OpenAI protocol are asked: concurrency,
    timeout (seconds), retries, requests_per_minute and extra_body (further fields of a
    request) are for them. Without, the model runs in this process: device, dtype,
    batch_size, revision and trust_remote_code are for that.
    """

    dataset: str
    samples: int = 12
    limit: int | None = None
    shuffle: int | None = None
    split: str | None = None
    config: str | None = None
    preset: str | None = None
    question_column: str | None = None
    answer_column: str | None = None
    dataset_revision: str | None = None
    system: str | None = None
    instruction: str | None = None
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int | None = None
    max_tokens: int = 16384
    seed: int = 0
    base_url: tuple[str, ...] = ()
    concurrency: int = 64
    timeout: float = 1800.0
    retries: int = 12
    requests_per_minute: float | None = None
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 32
    revision: str | None = None
    trust_remote_code: bool = False

    def arguments(self) -> list[str]:
        """Return the command line options that say the same; defaults are left out."""
        found: list[str] = []
        for one in dataclasses.fields(SamplingOptions):
            name, value = one.name.replace("_", "-"), getattr(self, one.name)
            if value == one.default or value in ((), {}):
                continue
            if one.name == "opened_by_prompt":
                found.append(f"--{name}" if value else f"--not-{name}")
            elif isinstance(value, bool):
                found.append(f"--{name}")
            elif isinstance(value, Mapping):
                found += [f"--{name}", json.dumps(dict(value))]
            else:
                values = value if isinstance(value, tuple) else (value,)
                found += [f"--{name}={each}" for each in values]
        return found


@dataclass(frozen=True, kw_only=True)
class SampleRequest(SamplingOptions):
    """Sample `model` into the sample file `out`, which an earlier run may have begun.

    model: a folder or a Hub name, with @REVISION or +ADAPTER as in mergekit's configs;
    of a server the name under which it serves the model.
    """

    model: str
    out: Location


@dataclass(frozen=True, kw_only=True)
class GradeRequest(GradingOptions):
    """Grade the responses of the file `source` anew, into the sample file `out`."""

    source: Location
    out: Location


@dataclass(frozen=True, kw_only=True)
class LabelRequest(GradingOptions):
    """Label the queries of two sample files, into the calibration file `out`.

    long, short: the files of the Long-CoT and the Short-CoT model on the same queries.
    exclude: evaluation sets (JSONL files or presets) whose queries are left out.
    per_pattern: at most so many queries of a pattern; balance: as many of either; seed:
    of the choice. prompts_only: write no responses, for a merge with `tokens: prompt`.
    partial: accept files of runs that have not finished.
    """

    long: Location
    short: Location
    out: Location
    exclude: tuple[str, ...] = ()
    per_pattern: int | None = None
    balance: bool = False
    seed: int = 0
    prompts_only: bool = False
    partial: bool = False


def secrets_of(
    base_urls: Iterable[str], api_key: str, extra_body: Mapping[str, Any]
) -> set[str]:
    """Return what no message may show: keys, passwords, and what they are sent as."""
    found = {value for key, value in extra_body.items() if _is_secret(key, value)}
    if api_key != "none":
        found.add(api_key)
    for url in base_urls:
        with contextlib.suppress(ValueError):
            parts = urlsplit(url)
            user, password = unquote(parts.username or ""), parts.password or ""
            if password:
                pair = f"{user}:{unquote(password)}"
                found |= {password, unquote(password), pair}
                found.add(base64.b64encode(pair.encode()).decode())
    return found


def recorded(extra_body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the further fields of requests as a file may have them: without keys."""
    return {k: "***" if _is_secret(k, v) else v for k, v in extra_body.items()}


def _is_secret(key: str, value: Any) -> bool:
    return isinstance(value, str) and bool(value) and bool(_SECRET.search(key))
