"""Write queries for `mergekit-rpam sample`: `python questions.py out.jsonl`.

By default those that calibration.jsonl was made from: 1000 of the `train` split, every
difficulty equally frequent.
"""

import argparse
import json
from pathlib import Path

import chains

SPLITS = ("train", "validation", "test")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="JSONL to write")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    queries = chains.queries(args.queries, args.split, args.seed, mix=(1,) * 8)
    with open(args.out, "w", encoding="utf-8") as file:
        for query in queries:
            record = {
                "question": query,
                "answer": chains.answer(query),
                "operations": chains.operations(query),
            }
            file.write(json.dumps(record) + "\n")
    print(f"{len(queries)} queries written to {args.out}")


if __name__ == "__main__":
    main()
