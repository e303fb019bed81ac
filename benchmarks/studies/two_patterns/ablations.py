"""Settings one at a time: one table over all pairs that were studied so."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from figures import Mix, over_chance, point
from jobs import ABLATIONS
from records import PairResults
from tables import spread, table

GROUP, REFERENCE = "ablations", "reference"


def ablations(pairs: Sequence[PairResults]) -> list[str]:
    """Return the table, of what was run with every seed; nothing if there is none.

    Changes are against the reference, on the same seeds' queries.
    """
    studied = [pair for pair in pairs if _whole(pair, REFERENCE)]
    if not studied:
        return []
    head = ["", *(pair.pair for pair in studied), "over chance, change of the mean"]
    head += ["all difficulties equal", "neutral text", "coefficients", "seconds"]
    rows = [
        _row(name, [pair for pair in studied if _whole(pair, name)], studied)
        for name in ABLATIONS
        if any(_whole(pair, name) for pair in studied)
    ]
    return ["## Settings, one at a time", "", *table(head, rows)]


def _whole(pair: PairResults, name: str) -> bool:
    return set(pair.by_seed.get((GROUP, name), ())) == set(pair.seeds)


def _row(
    name: str, pairs: Sequence[PairResults], studied: Sequence[PairResults]
) -> list[str]:
    """Return one setting's row; pairs that it was not run on have a dash."""
    shown = []
    for pair in studied:
        if pair not in pairs:
            shown.append("-")
            continue
        points = [point(r, s, pair.mix) for s, r in pair.by_seed[GROUP, name].items()]
        accuracy, tokens = (
            fmean(getattr(p, f) for p in points) for f in ("accuracy", "tokens")
        )
        shown.append(f"{100 * accuracy:.1f} % at {tokens:.1f}")
    for equal in (False, True):
        by_pair = {}
        for pair in pairs:
            mix = pair.flat if equal else pair.mix
            gained, before = (_over(pair, of, mix) for of in (name, REFERENCE))
            if name == REFERENCE:
                by_pair[pair.pair] = gained
            else:
                by_pair[pair.pair] = [
                    a - b for a, b in zip(gained, before, strict=True)
                ]
        shown.append(spread(by_pair, "+") + (" *" if name == REFERENCE else ""))
    records = [r for pair in pairs for r in pair.by_seed[GROUP, name].values()]
    neutral = []
    for pair in pairs:
        of = [r["chat"] for r in pair.by_seed[GROUP, name].values()]
        if None not in of:
            neutral.append(f"{fmean(of):.3f}")
    size = fmean(r["coefficient_bytes"] for r in records) / 1024
    seconds = fmean(r["seconds"] for r in records)
    return [name, *shown, ", ".join(neutral), f"{size:.0f} KiB", f"{seconds:.0f}"]


def _over(pair: PairResults, name: str, mix: Mix) -> list[float]:
    """Return by how much a setting beats chance, for every seed in order."""
    experts = [pair.by_group["validation"][way] for way in ("long", "short")]
    return [
        over_chance(record, *experts, seed, mix)
        for seed, record in sorted(pair.by_seed[GROUP, name].items())
    ]
