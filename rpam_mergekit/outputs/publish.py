"""What of a merge's output folder is published, and how it looks to others.

A plan lists every file that goes up, by its path in the repository, and everything
that is left out, with the reason. It is made without a network.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from rpam_mergekit.errors import RpamError, collect, refuse
from rpam_mergekit.folder.base_files import MODEL, TOKENIZER
from rpam_mergekit.folder.contents import (
    CARD,
    COEFFICIENTS,
    CONFIG,
    RECIPE,
    RECORD,
    STOCK_RECIPE,
    check_weights,
    find_coefficients,
    read_comparison,
    read_record,
    weight_files,
)
from rpam_mergekit.formats.hub_path import HubPath
from rpam_mergekit.outputs.card import complete
from rpam_mergekit.outputs.public_names import public_card, public_config, public_record

# Besides the weights, what belongs to a model; all else in the folder is left out.
OF_A_MODEL = (
    *MODEL,
    *(name for name in TOKENIZER if "/" not in name),
    "*.py",
    "LICENSE*",
    "NOTICE*",
    CONFIG,
    RECORD,
    STOCK_RECIPE,
)
UNFINISHED = ("*.lock", "*.log", "*.partial", "*.incomplete", "*.tmp", "*.unfinished")


@dataclass(frozen=True)
class Request:
    """What the options of `push` ask for; `named` are Hub names of local models."""

    out: Path
    repository: str
    revision: str | None = None
    weights: bool = True
    coefficients: str | None = None
    comparison: Path | None = None
    named: Mapping[str, str] = field(default_factory=dict)

    @property
    def published_coefficients(self) -> str:
        """The reference by which others get the coefficients file."""
        return str(HubPath(self.repository, COEFFICIENTS, self.revision))


@dataclass
class Plan:
    """Files to publish, by path in the repository; entries left out, with why.

    `card` is the model card before, and as it is published.
    """

    record: Mapping[str, Any]
    files: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    card: tuple[str, str] = ("", "")

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def make_plan(request: Request, scratch: Path) -> Plan:
    """Return what `request` publishes; what is made for it is written into `scratch`.

    Raises `RpamError` with all that is wrong with the folder, the coefficients and the
    options.
    """
    out = request.out
    plan = Plan(read_record(out))
    findings: list[str] = []
    shards: set[str] = set()
    if request.weights:
        shards = collect(findings, partial(weight_files, out)) or set()
    if shards:
        plan.notes += collect(findings, partial(check_weights, out, plan.record)) or []
    find = partial(find_coefficients, out, plan.record, request.coefficients)
    file = collect(findings, find)
    table = collect(findings, partial(read_comparison, request.comparison))
    recipe = collect(findings, partial(_recipe, request, plan))
    refuse(findings)
    assert recipe is not None  # else there were findings
    assert file is not None
    text, models = recipe
    _choose(plan, request, shards)
    plan.files[COEFFICIENTS] = file
    made = _made(plan, request, text, models, table)
    for name, content in made.items():
        plan.files[name] = scratch / name
        plan.files[name].write_text(content, encoding="utf-8", newline="\n")
    if request.weights:
        _report(plan, request, scratch)
    plan.notes += _leaks(plan)
    plan.files = dict(sorted(plan.files.items()))
    return plan


def _made(
    plan: Plan,
    request: Request,
    recipe: str | None,
    models: list[str],
    comparison: str | None,
) -> dict[str, str]:
    """Return the files that are written anew: record, card and the reader's config."""
    path = request.out / CARD
    before = path.read_text("utf-8") if path.exists() else ""
    record = public_record(plan.record, models)
    config = None if request.weights else recipe
    after = complete(
        public_card(before, request.named, models, config),
        record,
        comparison=comparison,
        recipe=RECIPE if recipe else None,
        weights=request.weights,
    )
    plan.card = (before, after)
    made = {RECORD: json.dumps(record, indent=2) + "\n", CARD: after}
    return made if recipe is None else {**made, RECIPE: recipe}


def _recipe(request: Request, plan: Plan) -> tuple[str | None, list[str]]:
    """Return the reader's config, if it can be made, and the models' names."""
    path = request.out / CONFIG
    if not path.exists():
        raise RpamError(f"OUT: {request.out} has no {CONFIG}. Run the merge again.")
    text, models, local = public_config(
        path.read_text("utf-8"),
        plan.record,
        request.named,
        request.published_coefficients,
    )
    advice = ", ".join(f"--model {model}=owner/name" for model in local)
    if local and not request.weights:
        raise RpamError(
            f"models: {', '.join(local)} are no names of Hub models, and without "
            f"weights others need the models themselves. Name them: {advice}."
        )
    if local:
        plan.notes.append(
            f"{RECIPE}, by which others repeat the merge, is left out: "
            f"{', '.join(local)} are no names of Hub models. Name them: {advice}."
        )
    return text, models if text else []


def _choose(plan: Plan, request: Request, shards: set[str]) -> None:
    """Put the files of OUT into the plan, or among what is left out."""
    made = {CARD, COEFFICIENTS, RECORD, RECIPE, "rpam", "additional_chat_templates"}
    out = request.out
    entries = [*out.iterdir(), *out.glob("rpam/*"), *out.glob("*_chat_templates/*")]
    for path in sorted(entries):
        name = path.relative_to(out).as_posix()
        if name in made:
            continue
        if path.name.startswith("."):
            plan.left_out[name] = "hidden"
        elif any(fnmatchcase(path.name, pattern) for pattern in UNFINISHED):
            plan.left_out[name] = "not a finished file"
        elif not request.weights:
            plan.left_out[name] = "--without-weights"
        elif not path.is_file():
            plan.left_out[name] = "no file"
        elif name in shards or _belongs(name):
            plan.files[name] = path
        else:
            plan.left_out[name] = "no part of the model"


def _belongs(name: str) -> bool:
    if name.startswith("additional_chat_templates/"):
        return name.endswith(".jinja")
    return any(fnmatchcase(name, pattern) for pattern in OF_A_MODEL)


def _report(plan: Plan, request: Request, scratch: Path) -> None:
    """Draw the report on the coefficients, or take the one in OUT."""
    names = ("report.html", "report.png")
    if importlib.util.find_spec("matplotlib") is None:
        there = {f"rpam/{name}": request.out / "rpam" / name for name in names}
        plan.files |= {name: path for name, path in there.items() if path.exists()}
        if not all(path.exists() for path in there.values()):
            plan.notes.append(
                "the report on the coefficients is left out: it needs matplotlib (pip "
                "install 'rpam-mergekit[plot]')."
            )
        return
    from rpam_mergekit.evaluate import coefficient_report
    from rpam_mergekit.evaluate.coefficient_figures import read_report

    found = replace(read_report(plan.files[COEFFICIENTS]), path=COEFFICIENTS)
    coefficient_report.write(scratch / "rpam", found)
    plan.files |= {f"rpam/{name}": scratch / "rpam" / name for name in names}
    for name in names:
        plan.left_out.pop(f"rpam/{name}", None)


def _leaks(plan: Plan) -> list[str]:
    """Return a note if files name folders of this machine."""
    home = str(Path.home())
    texts = {
        name: path.read_text("utf-8", errors="replace")
        for name, path in plan.files.items()
        if name in (CARD, CONFIG, RECIPE, RECORD, STOCK_RECIPE)
    }
    found = [name for name, text in texts.items() if home in text or ": /" in text]
    if not found:
        return []
    return [f"{' and '.join(found)} name folders of this machine; have a look at them."]
