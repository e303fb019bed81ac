"""How merges of one pair closed their layers' gaps, side by side.

    python benchmarks/studies/two_patterns/gaps.py OUT [OUT ...]

OUT is the folder of a merge. For every layer: the gap before and after solving, and the
share of the objective that lies on its heaviest token, from `rpam.json`; below, what
the pre-pass measured on held-out queries. `token_scale` decides in which measure a gap
is given: two merges with different ones show what either sees, not which is closer.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "performance"))

from _machine import describe, table

from rpam_mergekit.evaluate.routing_report import summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="+", type=Path)
    args = parser.parse_args()
    print(describe())
    records = [json.loads((out / "rpam.json").read_text()) for out in args.out]
    head = ["layer"]
    for out, record in zip(args.out, records, strict=True):
        measure = record["settings"]["token_scale"]
        head += [f"{out.name} ({measure}): gap before", "after", "heaviest token"]
    rows = []
    for index, layers in enumerate(zip(*(r["layers"] for r in records), strict=True)):
        row = [str(index)]
        for layer in layers:
            gaps = (layer["gap_before"], layer["gap_after"])
            row += [*(f"{gap:.3f}" for gap in gaps), f"{layer['heaviest_token']:.0%}"]
        rows.append(row)
    print(table(head, rows))
    for out, record in zip(args.out, records, strict=True):
        print(f"{out.name}: {summary(record['operating_point'] or {})}")


if __name__ == "__main__":
    main()
