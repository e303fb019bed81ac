"""Write docs/evidence.md and its picture from the study's results.

    python benchmarks/studies/two_patterns/evidence.py  # after study.py; seconds

What the tables say in words is findings.md beside this file, written by hand.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import picture
from ablations import ablations
from figures import Cell, point
from records import PairResults, read
from tables import percent, spread, table
from tasks import ROOT

HERE = Path(__file__).parent
DOCS = ROOT / "docs"


def experts(pairs: Sequence[PairResults]) -> list[str]:
    """Return the tables of what the experts can do."""
    lines = []
    for pair in pairs:
        head = [f"{pair.pair}, {pair.task.unit}", *map(str, pair.flat)]
        rows = []
        for name, record in (("Long", pair.long), ("Short", pair.short)):
            shown = []
            for difficulty in pair.flat:
                of = [point(record, seed, {difficulty: 1}) for seed in pair.seeds]
                accuracy = sum(p.accuracy for p in of) / len(of)
                tokens = sum(p.tokens for p in of) / len(of)
                shown.append(f"{100 * accuracy:.0f} % at {tokens:.0f}")
            rows.append([f"{name}: right, tokens", *shown])
        mix = [f"{100 * w / sum(pair.task.mix):.0f} %" for w in pair.task.mix]
        lines += table(head, [*rows, ["asked in the mix", *mix]])
    return lines


COLUMNS = {
    "merged, %": lambda c: c.merged.accuracy,
    "of Long's": lambda c: c.kept,
    "tokens saved": lambda c: c.saved,
    "over the sweep": lambda c: c.merged.accuracy - c.sweep,
    "over the best other": lambda c: c.merged.accuracy - c.best_other,
    "over the hull": lambda c: c.merged.accuracy - c.hull,
    "over the hull of all": lambda c: c.merged.accuracy - c.hull_of_all,
    "against the router": lambda c: c.merged.accuracy - c.router,
    "closed well": lambda c: c.merged.closed,
}


# Those of the README's table, which is written between these lines.
SHOWN = ("merged, %", "of Long's", "tokens saved", "over the best other")
SHOWN += ("over the hull", "against the router")
BEGIN, FINISH = "<!-- evidence.py writes this table -->", "<!-- until here -->"


def comparison(
    pairs: Sequence[PairResults], equal: bool, columns: Iterable[str] = COLUMNS
) -> list[str]:
    """Return the table of the defaults against everything else."""
    found = {
        pair.pair: pair.cells("main", "defaults", pair.flat if equal else pair.mix)
        for pair in pairs
    }
    columns = list(columns)
    rows = []
    for pair, cells in found.items():
        rows.append([pair, *(_column(c, {pair: cells}) for c in columns)])
    rows.append(["**mean of pairs**", *(_column(c, found) for c in columns)])
    return table(["pair", *columns], rows)


def with_table(readme: str, pairs: Sequence[PairResults]) -> str:
    """Return the README with its table of the defaults as the results have it."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(FINISH)
    lines = comparison(pairs, equal=False, columns=SHOWN)
    return "\n".join([before + BEGIN, *lines, FINISH]) + after


def _column(name: str, cells: dict[str, list[Cell]]) -> str:
    sign = "+" if name.startswith(("over", "against")) else ""
    values = {pair: [COLUMNS[name](c) for c in of] for pair, of in cells.items()}
    return spread(values, sign)


def thinking(pairs: Sequence[PairResults]) -> list[str]:
    """Return how often the merged model thinks, by difficulty."""
    lines = []
    for pair in pairs:
        merged = pair.by_seed["main", "defaults"]
        every = [*pair.flat, *pair.beyond]
        rows = []
        for name, figure in (("thinks", "thinks"), ("right", "accuracy")):
            shown = []
            for difficulty in every:
                of = [point(r, s, {difficulty: 1}) for s, r in merged.items()]
                shown.append(percent([getattr(p, figure) for p in of], places=0))
            rows.append([f"{name}, %", *shown])
        for name, record in (
            ("Long right, %", pair.long),
            ("Short right, %", pair.short),
        ):
            shown = []
            for difficulty in every:
                of = [point(record, s, {difficulty: 1}) for s in pair.seeds]
                shown.append(percent([p.accuracy for p in of], places=0))
            rows.append([name, *shown])
        head = [f"{pair.pair}, {pair.task.unit}", *map(str, pair.flat)]
        head += [f"*{difficulty}*" for difficulty in pair.beyond]
        lines += table(head, rows)
    return lines


def chat(pairs: Sequence[PairResults]) -> list[str]:
    """Return the log-likelihoods per token of what both experts say alike."""
    rows = []
    for pair in pairs:
        if pair.long["chat"] is None:
            continue
        merged = [r["chat"] for r in pair.by_seed["main", "defaults"].values()]
        sweep = pair.by_group.get("sweep", {}).get("0.50000")
        rows.append(
            [
                pair.pair,
                f"{pair.long['chat']:.4f}",
                f"{pair.short['chat']:.4f}",
                ", ".join(f"{value:.4f}" for value in merged),
                "-" if sweep is None else f"{sweep['chat']:.4f}",
            ]
        )
    return table(["pair", "Long", "Short", "merged, by seed", "average of both"], rows)


def methods(pairs: Sequence[PairResults]) -> list[str]:
    """Return each method's best at the merged model's tokens or fewer."""
    names = ("linear", "task_arithmetic", "ties", "dare_ties", "slerp", "sce")
    rows = []
    for pair in pairs:
        cells = pair.cells("main", "defaults", pair.mix)
        row = [pair.pair, percent([c.merged.accuracy for c in cells])]
        for name in (*names, "karcher"):
            records = pair.sweep if name == "linear" else pair.others.values()
            of = [r for r in records if r["job"]["config"]["merge_method"] == name]
            best = []
            for seed, c in zip(sorted(pair.seeds), cells, strict=True):
                places = [point(r, seed, pair.mix).place for r in of]
                within = [a for t, a in places if t <= c.merged.tokens]
                best.append(max(within, default=math.nan))
            missing = any(math.isnan(value) for value in best)
            row.append("-" if missing else percent(best))
        rows.append(row)
    return table(["pair", "rpam", *names, "karcher"], rows)


def findings() -> str:
    """Return the text of findings.md with its links as they are from `DOCS`."""
    text = (HERE / "findings.md").read_text(encoding="utf-8")
    return re.sub(
        r"(?<=\]\()(?!\w+:|#)[^)#]+",
        lambda link: Path(os.path.relpath(HERE / link[0], DOCS)).as_posix(),
        text,
    )


def write(pairs: Sequence[PairResults], docs: Path) -> None:
    """Write evidence.md and evidence.png into `docs`."""
    lines = [
        findings().rstrip(),
        "",
        "![Accuracy against mean tokens, for every pair](evidence.png)",
        "",
        "## The experts",
        "",
        *experts(pairs),
        "## Defaults against everything else, in the task's mix",
        "",
        *comparison(pairs, equal=False),
        "## The same, every difficulty equally frequent",
        "",
        *comparison(pairs, equal=True),
        "## Where the merged model thinks",
        "",
        "Difficulties in italics are beyond all training and calibration.",
        "",
        *thinking(pairs),
        "## Other methods of mergekit",
        "",
        "Accuracy in the mix, of the best model of each method's grid that needs at "
        "most the merged model's tokens.",
        "",
        *methods(pairs),
        "## Neutral text",
        "",
        "Mean log-likelihood per token of replies that both experts were taught alike.",
        "",
        *chat(pairs),
        *ablations(pairs),
    ]
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "evidence.md").write_text("\n".join(lines).rstrip() + "\n", "utf-8")
    picture.draw(docs / "evidence.png", pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    pairs = read(args.results)
    write(pairs, args.docs)
    print(f"written to {args.docs / 'evidence.md'}")
    if args.docs == DOCS:
        readme = ROOT / "README.md"
        readme.write_text(with_table(readme.read_text("utf-8"), pairs), "utf-8")


if __name__ == "__main__":
    main()
