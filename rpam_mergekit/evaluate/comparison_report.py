"""What `compare` writes: text, CSV, Markdown for a model card, a picture."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from rpam_mergekit.errors import RpamError
from rpam_mergekit.evaluate.compare import METRICS, Comparison, Estimate, Model
from rpam_mergekit.evaluate.plots import new_figure, save
from rpam_mergekit.formats.files import write_whole
from rpam_mergekit.text import aligned, markdown_table

_HEADINGS = {
    "accuracy": "accuracy",
    "tokens": "mean tokens",
    "saved": "tokens saved",
    "thinking": "thinks",
    "closed": "closes properly",
    "cut_off": "cut off",
}
_YARDSTICKS = {
    "sweep": "the sweep at the same tokens",
    "hull": "its upper hull (random mixing)",
    "router": "the perfect router at the same tokens",
    "long": "Long (its own tokens)",
    "short": "Short (its own tokens)",
}


def text(found: Comparison) -> str:
    """Return the tables as plain text, sweep models left out."""
    lines = [_scope(found), ""]
    for dataset in found.rows:
        rows = [["", *_HEADINGS.values(), "median tokens"]]
        rows += [_row(found, dataset, model) for model in _shown(found)]
        if len(found.rows) > 1:
            lines.append(f"{dataset}:")
        lines += [*aligned(rows), ""]
    if found.against:
        lines.append("accuracy of the merged model less that of")
        rows = [
            [f"  {_YARDSTICKS[name]}", shown(level, ".1%"), shown(difference, "+.1%")]
            for name, (level, difference) in found.against.items()
        ]
        lines += [*aligned(rows), ""]
    lines += aligned(_strata(found))
    return "\n".join(lines)


def markdown(found: Comparison) -> str:
    """Return the tables for a model card."""
    lines = [_scope(found), ""]
    for dataset in found.rows:
        if len(found.rows) > 1:
            lines += [f"**{dataset}**", ""]
        rows = [_row(found, dataset, model) for model in _shown(found)]
        lines += [*markdown_table(["", *_HEADINGS.values(), "median tokens"], rows), ""]
    if found.against:
        rows = [
            [_YARDSTICKS[name], shown(level, ".1%"), shown(difference, "+.1%")]
            for name, (level, difference) in found.against.items()
        ]
        lines += [
            *markdown_table(["yardstick", "accuracy", "merged, less that"], rows),
            "",
        ]
    strata = _strata(found)
    if strata:
        lines += markdown_table(strata[0], strata[1:])
    return "\n".join(lines).rstrip() + "\n"


def table_csv(found: Comparison) -> str:
    """Return every figure of every model, one a row, as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["dataset", "model", "role", "figure", "value", "low", "high"])
    for dataset, rows in found.rows.items():
        for model in found.models:
            for metric in METRICS:
                e = rows[model.name][metric]
                values = [_plain(v) for v in (e.value, e.low, e.high)]
                writer.writerow([dataset, model.name, model.role, metric, *values])
            median = _plain(found.medians[dataset][model.name])
            row = [dataset, model.name, model.role, "median_tokens", median, "", ""]
            writer.writerow(row)
    last = list(found.rows)[-1]
    for name, pair in found.against.items():
        for figure, e in zip(("accuracy", "merged_less_it"), pair, strict=True):
            values = [_plain(v) for v in (e.value, e.low, e.high)]
            writer.writerow([last, name, "yardstick", figure, *values])
    return out.getvalue()


def picture(found: Comparison) -> Any:
    """Draw accuracy against mean tokens, with intervals and yardsticks.

    Models differ by marker and yardsticks by dashes, not by colour alone.
    """
    figure, axes = new_figure((7, 4.6), dpi=130)
    for points, style, colour, name in (
        (found.curve, "o-", "0.55", "interpolation sweep"),
        (found.hull, "--", "0.35", "its upper hull"),
        (found.router, ":", "black", "perfect router of the experts"),
    ):
        if len(points) > 1:
            axes.plot(
                [tokens for tokens, _ in points],
                [100 * accuracy for _, accuracy in points],
                style,
                color=colour,
                markersize=3.5,
                linewidth=1.2,
                label=name,
            )
    rows = found.rows[list(found.rows)[-1]]
    looks = {"long": "#0072B2s", "short": "#009E73^", "merged": "#D55E00*"}
    for model in found.models:
        accuracy, tokens = rows[model.name]["accuracy"], rows[model.name]["tokens"]
        if model.role not in looks or tokens.value is None or accuracy.value is None:
            continue
        look = looks[model.role]
        axes.errorbar(
            tokens.value,
            100 * accuracy.value,
            yerr=_errors(accuracy, 100),
            xerr=_errors(tokens, 1),
            fmt=look[-1],
            color=look[:-1],
            markersize=15 if model.role == "merged" else 9,
            markeredgecolor="black",
            markeredgewidth=0.6,
            capsize=3,
            label=f"{model.role}: {model.name}",
            zorder=3,
        )
    axes.set_xlabel("mean tokens of a response")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)
    figure.tight_layout()
    return figure


def write(folder: Path, found: Comparison) -> None:
    """Write compare.txt, compare.csv, compare.md and compare.png into `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (
            ("compare.txt", text(found) + "\n"),
            ("compare.csv", table_csv(found)),
            ("compare.md", markdown(found)),
        ):
            write_whole(folder / name, content.encode())
        save(picture(found), folder / "compare.png")
    except OSError as error:
        raise RpamError(f"--out: cannot write {folder}: {error.strerror}") from None


def shown(e: Estimate, form: str) -> str:
    """Return a figure with its interval, "-" where it is not defined."""
    if e.value is None:
        return "-"
    if e.low is None or e.high is None:
        return format(e.value, form)
    return f"{e.value:{form}} ({e.low:{form}}, {e.high:{form}})".replace("%", " %")


def _row(found: Comparison, dataset: str, model: Model) -> list[str]:
    figures = found.rows[dataset][model.name]
    cells = [
        shown(figures[metric], ".1f" if metric == "tokens" else ".1%")
        for metric in METRICS
    ]
    median = found.medians[dataset][model.name]
    return [model.name, *cells, "-" if median is None else f"{median:g}"]


def _shown(found: Comparison) -> list[Model]:
    return [model for model in found.models if model.role != "sweep"]


def _scope(found: Comparison) -> str:
    sets = ", ".join(f"{name} ({n})" for name, n in found.queries.items())
    dropped = f"; {found.dropped} others are not in every file" if found.dropped else ""
    each = ", each data set counting the same" if len(found.queries) > 1 else ""
    return f"queries: {sets}{dropped}. Means{each}; 95 % intervals by bootstrap."


def _strata(found: Comparison) -> list[list[str]]:
    if not found.strata:
        return []
    names = [model.name for model in _shown(found)]
    rows = [[found.strata_by, *(f"{n}: accuracy, tokens, thinks" for n in names)]]
    for label, figures in found.strata.items():
        cells = []
        for name in names:
            accuracy, tokens, thinks = figures[name]
            count = "-" if tokens is None else f"{tokens:.1f}"
            cells.append(f"{accuracy:.0%}, {count}, {thinks:.0%}".replace("%", " %"))
        rows.append([label, *cells])
    return rows


def _errors(e: Estimate, scale: float) -> Any:
    if e.value is None or e.low is None or e.high is None:
        return None
    return [[scale * (e.value - e.low)], [scale * (e.high - e.value)]]


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
