"""What a coefficients file says: gaps by layer, coefficients by module, what moved.

As text, as a picture, and as one HTML page that needs nothing but itself.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rpam_mergekit.errors import RpamError
from rpam_mergekit.evaluate import routing_report
from rpam_mergekit.evaluate.coefficient_figures import OUTSIDE, CoefficientReport
from rpam_mergekit.evaluate.plots import new_figure, rendered, save
from rpam_mergekit.formats.files import write_whole
from rpam_mergekit.text import aligned


def text(report: CoefficientReport) -> str:
    """Return the tables as plain text."""
    head, rows = layer_rows(report)
    lines = [
        f"{report.path} (rpam-mergekit {report.version})",
        f"{', '.join(f'{role} {name}' for role, name in _models(report).items())}; "
        f"{report.settings.get('granularity', '?')}",
        "",
        *aligned([head, *rows]),
        "",
        *aligned([_MODULE_HEAD, *module_rows(report)]),
        "",
        *_NOTES,
        "",
    ]
    for head, rows in _routing_tables(report):
        lines += aligned([head, *rows])
    return "\n".join([*lines, *_routing_lines(report)])


def _routing_tables(
    report: CoefficientReport,
) -> list[tuple[list[str], list[list[str]]]]:
    """Return the routing table, if anything was held out."""
    return [routing_report.table(report.point)] if report.point.get("held_out") else []


def _routing_lines(report: CoefficientReport) -> list[str]:
    """Return what is said of the merge's routing."""
    found = [routing_report.summary(report.point)]
    if report.point.get("held_out"):
        found = [
            routing_report.NOTE,
            routing_report.operating_point(report.point),
            *found,
        ]
    granularity = report.settings.get("granularity")
    said = routing_report.warnings(report.point, report.layers, granularity)
    return [*found, *said]


def _models(report: CoefficientReport) -> dict[str, str]:
    return {"base": "?", "other": "?"} if not report.models else dict(report.models)


_MODULE_HEAD = ["module", "mean", "5 %", "25 %", "median", "75 %", "95 %", "departure"]
_NOTES = (
    "divergence: squared distance of the two experts' hidden states, relative to their "
    "mean squared length",
    "gap: squared distance to the expert each query should follow; 1 is the distance "
    "of the other expert",
    "coefficients are shares of the other model: 0 is the base; quantiles are means "
    "over the layers",
    "departure: mean distance from the initial weight",
    "all coefficients as solved, before the scale of the operating point",
    "heaviest token: what share of a query's objective lies on one token",
)


def layer_rows(report: CoefficientReport) -> tuple[list[str], list[list[str]]]:
    """Return heading and rows of the layer table."""
    head = [
        "layer",
        "divergence",
        "gap before",
        "gap after",
        "closed",
        "mean coefficient",
        "departure",
        "heaviest token",
    ]
    rows = []
    for layer in report.layers:
        before, after = layer["gap_before"], layer["gap_after"]
        # No minus sign before a zero.
        closed = f"{round(1 - after / before, 2) + 0.0:.0%}" if before else "-"
        rows.append(
            [
                str(layer["layer"]),
                _shown(layer.get("divergence")),
                f"{before:.4f}",
                f"{after:.4f}",
                closed.replace("%", " %"),
                f"{layer['mean_coefficient']:.3f}",
                f"{report.moved(layer['layer']):.3f}",
                f"{layer['heaviest_token']:.0%}" if "heaviest_token" in layer else "-",
            ]
        )
    return head, rows


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def module_rows(report: CoefficientReport) -> list[list[str]]:
    """Return a row per module, its figures averaged over the layers."""
    rows = []
    for module in [*report.modules, OUTSIDE]:
        of = [t for t in report.tensors if t.module == module]
        if not of:
            continue
        quantiles = [sum(t.quantiles[n] for t in of) / len(of) for n in range(5)]
        numbers = [sum(t.mean for t in of) / len(of), *quantiles]
        cells = [f"{number:.3f}" for number in numbers]
        departure = sum(t.departure for t in of) / len(of)
        cells.append("-" if module == OUTSIDE else f"{departure:.3f}")
        rows.append([module, *cells])
    return rows


def picture(report: CoefficientReport) -> Any:
    """Return a figure: gaps by layer, coefficients by module, and departures."""
    modules = report.modules
    height = 2.6 + 0.26 * len(modules)
    figure, (gaps, spread, moved) = new_figure(
        (13, max(3.6, height)), columns=3, dpi=110, layout="constrained"
    )
    numbers = [layer["layer"] for layer in report.layers]
    for key, style, name in (
        ("gap_before", "o--", "initial weights"),
        ("gap_after", "s-", "solved"),
    ):
        values = [layer[key] for layer in report.layers]
        gaps.plot(numbers, values, style, color="black", label=name, markersize=4)
    gaps.set(xlabel="layer", ylabel="gap to the positive expert", ylim=(0, None))
    gaps.legend()
    gaps.grid(alpha=0.3)
    for row, module in enumerate(modules):
        of = [t for t in report.tensors if t.module == module]
        low, first, middle, third, high = (
            sum(t.quantiles[n] for t in of) / len(of) for n in range(5)
        )
        spread.plot([low, high], [row, row], color="0.5", linewidth=1)
        spread.plot([first, third], [row, row], color="#0072B2", linewidth=6)
        spread.plot(middle, row, "|", color="white", markersize=8)
    spread.axvline(report.initial, color="0.6", linestyle=":")
    spread.set(xlabel="coefficient (5, 25, 50, 75, 95 %)")
    layers = sorted({t.layer for t in report.tensors if t.layer is not None})
    grid = [
        [
            next(
                (t.departure for t in report.tensors if (t.layer, t.module) == (n, m)),
                float("nan"),
            )
            for n in layers
        ]
        for m in modules
    ]
    for axes in (spread, moved):
        axes.set_yticks(range(len(modules)), modules if axes is spread else [])
        axes.set_ylim(len(modules) - 0.5, -0.5)
    image = moved.imshow(grid, cmap="Greys", aspect="auto", vmin=0)
    moved.set(xlabel="layer")
    moved.set_xticks(range(len(layers)), layers, fontsize=7)
    figure.colorbar(image, ax=moved, label="departure from the initial weight")
    return figure


def page(report: CoefficientReport) -> str:
    """Return the report as one HTML page without scripts or links to other files."""
    svg = rendered(picture(report), "svg").decode("utf-8")
    svg = svg[svg.index("<svg") :]
    head, rows = layer_rows(report)
    settings = [[name, str(value)] for name, value in sorted(report.settings.items())]
    title = f"rpam: {' + '.join(_models(report).values())}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            f"<p>{html.escape(report.path)}, rpam-mergekit "
            f"{html.escape(report.version)}</p>",
            f"<figure>{svg}</figure>",
            "<h2>Layers</h2>",
            _html_table(head, rows),
            "<h2>Modules</h2>",
            _html_table(_MODULE_HEAD, module_rows(report)),
            *(f"<p>{html.escape(note)}.</p>" for note in _NOTES),
            "<h2>Routing</h2>",
            *(_html_table(*table) for table in _routing_tables(report)),
            *(f"<p>{html.escape(line)}</p>" for line in _routing_lines(report)),
            "<h2>Settings</h2>",
            _html_table(["setting", "value"], settings),
            "</body></html>",
            "",
        ]
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;"
    "padding:0 1rem;color:#111;background:#fff}"
    "table{border-collapse:collapse;margin:.5rem 0 1.5rem}"
    "td,th{padding:.15rem .8rem;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}"
    "figure{margin:1rem 0}svg{max-width:100%;height:auto}"
)


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"


def write(folder: Path, report: CoefficientReport) -> None:
    """Write report.txt, report.png and report.html into `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "report.txt", f"{text(report)}\n".encode())
        save(picture(report), folder / "report.png")
        write_whole(folder / "report.html", page(report).encode())
    except OSError as error:
        raise RpamError(f"--out: cannot write {folder}: {error.strerror}") from None
