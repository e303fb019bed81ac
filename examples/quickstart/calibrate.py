"""Label calibration queries by what the two experts do: `python calibrate.py`.

Each expert answers every query of a draw from the `train` split 8 times at temperature
1. The pattern is `long` where Long is right more often than Short by over 1 / 16, else
`short`; queries that neither solves are left out (arXiv 2601.03506, section 3). The
response kept is the shortest correct one of the chosen expert. Writes
calibration.jsonl, as many queries of either pattern.
"""

import argparse
import json
import random
from pathlib import Path

import chains
import evaluate
import torch
from transformers import AutoTokenizer

HERE = Path(__file__).parent
SAMPLES = 8


def correct_responses(model, tokenizer, queries: list[str]) -> dict[str, list[str]]:
    """Return each query's correct responses out of SAMPLES, without the end token."""
    found: dict[str, list[str]] = {query: [] for query in queries}
    for _ in range(SAMPLES):
        responses = evaluate.respond(model, tokenizer, queries, sample=True)
        for query, response in zip(queries, responses, strict=True):
            if evaluate.grade(query, response)["correct"]:
                found[query].append(response.removesuffix("<|end|>"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=Path, default=HERE)
    parser.add_argument("--out", type=Path, default=HERE / "calibration.jsonl")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--per-pattern", type=int, default=256)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.experts / "long")
    queries = chains.queries(args.queries, "train", seed=1, mix=(1,) * 8)
    solved = {
        pattern: correct_responses(
            evaluate.load(args.experts / pattern), tokenizer, queries
        )
        for pattern in ("long", "short")
    }
    records: dict[str, list[dict]] = {"long": [], "short": []}
    for query in queries:
        long, short = (len(solved[p][query]) / SAMPLES for p in ("long", "short"))
        if not long and not short:
            continue
        pattern = "long" if long - short > 1 / (2 * SAMPLES) else "short"
        records[pattern].append(
            {
                "prompt": query,
                "pattern": pattern,
                "response": min(solved[pattern][query], key=len),
                "answer": chains.answer(query),
                "long_accuracy": long,
                "short_accuracy": short,
                "source": {"operations": chains.operations(query)},
            }
        )
    rng = random.Random(0)
    chosen = [
        record
        for of_pattern in records.values()
        for record in rng.sample(of_pattern, min(args.per_pattern, len(of_pattern)))
    ]
    rng.shuffle(chosen)
    with open(args.out, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in chosen)
    for difficulty in chains.DIFFICULTIES:
        labels = [
            pattern
            for pattern, of_pattern in records.items()
            for record in of_pattern
            if record["source"]["operations"] == difficulty
        ]
        print(
            f"{difficulty} operations: {labels.count('short')} short, "
            f"{labels.count('long')} long"
        )
    print(f"{len(chosen)} queries written to {args.out}")


if __name__ == "__main__":
    main()
