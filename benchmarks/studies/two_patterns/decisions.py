"""What the decision needs: if responses are long; if Long never opened its thinking.

    python benchmarks/studies/two_patterns/decisions.py lengths [--limits 0 256]
    python benchmarks/studies/two_patterns/decisions.py opening LONG [--weights 0 0.3]

Both merge the quickstart's pair and let the merged models answer validation queries.

`lengths`: whether to think is decided at the prompt's last token, one of ten tokens of
a short response, one of a thousand of a long one. The thinking of the calibration
file's `long` responses is lengthened by writing its steps again and again until a
response has about so many tokens (0: as they are); the weights are `decision_weight`,
the limits `max_response_tokens` (0: responses are replayed whole).
The models take the few tokens that they always took: what is measured is whether the
decision survives in the objective, not how a model would think at length.

`opening`: LONG is the folder of a Long whose template has always opened its thinking
and that never had a loss on the opening, such as that of the pair `chains-unopened`,
which `training.py` builds; the weights are `opening_weight`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "performance"))
sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "quickstart"))

import chains
import evaluate
import yaml
from _machine import describe, table
from pairs import QUICKSTART
from transformers import AutoTokenizer


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


def merged(folder: Path, long: Path, tokens: int, **parameters: float) -> Path:
    """Merge by the quickstart's queries, lengthened; return the output folder."""
    lines = (QUICKSTART / "calibration.jsonl").read_text().splitlines()
    calibration = folder / "calibration.jsonl"
    records = [lengthened(json.loads(line), tokens) for line in lines]
    calibration.write_text("".join(json.dumps(r) + "\n" for r in records))
    config = yaml.safe_load((QUICKSTART / "rpam.yml").read_text())
    config["base_model"] = str(long)
    config["models"][0]["model"] = str(QUICKSTART / "short")
    config["parameters"] = {"calibration": str(calibration), **parameters}
    path = folder / "rpam.yml"
    path.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).parent / "mergekit-yaml"), str(path)]
    subprocess.run([*command, str(folder / "out"), "--quiet"], check=True)
    return folder / "out"


def row(
    label: list[str], long: Path, tokens: int, queries: list[str], **parameters: float
) -> list[str]:
    """Return what a merge reaches, behind what it is called."""
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        out = merged(Path(folder), long, tokens, **parameters)
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        record = json.loads((out / "rpam.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(out)
        result = evaluate.evaluate(evaluate.load(out), tokenizer, queries, "merged")
    point = record["operating_point"]
    patterns = [point["held_out"]["patterns"][name] for name in ("long", "short")]
    thinks = [f"{100 * s['thinking']:.0f}" for s in result.by_difficulty.values()]
    opens = record["thinking"]["opens_by_itself"]
    return [
        *label,
        "-" if opens is None else f"{100 * opens:.1f}",
        f"{100 * result.accuracy:.1f}",
        f"{100 * evaluate.equally_frequent(result).accuracy:.1f}",
        f"{result.tokens:.1f}",
        " ".join(thinks),
        "-" if result.closed is None else f"{100 * result.closed:.0f}",
        " ".join(f"{100 * f['routed']:.0f}" for f in patterns),
        f"{point['scale']:g}",
        f"{seconds:.0f}",
    ]


HEAD = ["Long opens by itself, %", "accuracy, %", "all difficulties equal, %"]
HEAD += ["tokens", "thinks at 1 .. 8, %", "closed, %"]
HEAD += ["held out, routed: long, short, %", "scale", "user CPU seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["lengths", "opening"])
    parser.add_argument("long", nargs="?", type=Path, default=QUICKSTART / "long")
    parser.add_argument("--tokens", type=int, nargs="+", default=[0, 100, 1000])
    parser.add_argument("--limits", type=int, nargs="+", default=[0])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.3])
    parser.add_argument("--queries", type=int, default=1200)
    args = parser.parse_args()
    queries = chains.queries(args.queries, "validation", 0)
    lengths = args.what == "lengths"
    setting = "decision_weight" if lengths else "opening_weight"
    print(describe(), flush=True)
    rows = []
    tried = itertools.product(args.tokens if lengths else [0], args.limits)
    for (tokens, limit), weight in itertools.product(tried, args.weights):
        label = [str(tokens or "as it is"), str(limit or "whole"), f"{weight:g}"]
        parameters = {setting: weight, "max_response_tokens": limit}
        rows.append(row(label, args.long, tokens, queries, **parameters))
        print("|".join(rows[-1]), file=sys.stderr, flush=True)
    print(table(["tokens of a response", "replayed", setting, *HEAD], rows))


if __name__ == "__main__":
    main()
