"""Does one token decide enough where responses are long? The quickstart, lengthened.

    python benchmarks/response_length.py [--tokens 0 100 1000] [--weights 0 0.3]

Whether to think is decided at the prompt's last token: one of ten tokens of a short
response, one of a thousand of a long one. Here the thinking of the calibration file's
`long` responses is lengthened by writing its steps again and again until a response has
about so many tokens (0: as they are), and the pair is merged with `decision_weight` 0
and more. The merged models answer the quickstart's validation queries, which take the
few tokens that they always took: what is measured is whether the decision survives in
the objective. It is not measured how the model would think at length, which this Long
does not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe, table

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import chains  # noqa: E402
import evaluate  # noqa: E402
import yaml  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402


def lengthened(record: dict, tokens: int) -> dict:
    """Return a calibration record whose thinking has about so many tokens."""
    text = record["response"]
    if record["pattern"] != "long" or len(text) >= tokens:
        return record
    before, closing, answer = text.partition(chains.END_THINK)
    steps = before.removeprefix(chains.THINK)
    times = max(1, round((tokens - len(answer) - 2) / (len(steps) + 1)))
    thinking = ";".join([steps] * times)
    return {**record, "response": f"{chains.THINK}{thinking}{closing}{answer}"}


def merged(folder: Path, tokens: int, **parameters: float) -> Path:
    """Merge the pair by lengthened responses; return the output folder."""
    lines = (QUICKSTART / "calibration.jsonl").read_text().splitlines()
    calibration = folder / "calibration.jsonl"
    records = [lengthened(json.loads(line), tokens) for line in lines]
    calibration.write_text("".join(json.dumps(r) + "\n" for r in records))
    config = yaml.safe_load((QUICKSTART / "rpam.yml").read_text())
    config["base_model"] = str(QUICKSTART / "long")
    config["models"][0]["model"] = str(QUICKSTART / "short")
    config["parameters"] = {"calibration": str(calibration), **parameters}
    path = folder / "rpam.yml"
    path.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).parent / "mergekit-yaml"), str(path)]
    subprocess.run([*command, str(folder / "out"), "--quiet"], check=True)
    return folder / "out"


def row(tokens: int, weight: float, queries: list[str]) -> list[str]:
    """Return what a merge by responses of `tokens` tokens reaches."""
    with tempfile.TemporaryDirectory() as folder:
        out = merged(Path(folder), tokens, decision_weight=weight)
        record = json.loads((out / "rpam.json").read_text())["operating_point"]
        tokenizer = AutoTokenizer.from_pretrained(out)
        result = evaluate.evaluate(evaluate.load(out), tokenizer, queries, "merged")
    held_out = record["held_out"]
    routed = [f"{100 * f['routed']:.0f}" for f in held_out["patterns"].values()]
    thinks = [f"{100 * s['thinking']:.0f}" for s in result.by_difficulty.values()]
    return [
        str(tokens or "as it is"),
        f"{weight:g}",
        f"{100 * result.accuracy:.1f}",
        f"{100 * evaluate.equally_frequent(result).accuracy:.1f}",
        f"{result.tokens:.1f}",
        " ".join(thinks),
        "-" if result.closed is None else f"{100 * result.closed:.0f}",
        " ".join(routed),
        f"{record['scale']:g}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[0, 100, 1000])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.3])
    parser.add_argument("--queries", type=int, default=1200)
    args = parser.parse_args()
    queries = chains.queries(args.queries, "validation", 0)
    head = ["tokens of a response", "decision_weight", "accuracy, %"]
    head += ["all difficulties equal, %", "tokens", "thinks at 1 .. 8, %"]
    head += ["closed, %", "held out, routed: short, long, %", "scale"]
    print(describe(), flush=True)
    rows = [row(t, weight, queries) for t in args.tokens for weight in args.weights]
    print(table(head, rows))


if __name__ == "__main__":
    main()
