"""What was tried on the quickstart pair: `python benchmarks/quickstart_search.py`.

Every variant is a whole merge by mergekit, evaluated on the *validation* queries; the
test queries play no part in choosing defaults. Prints a Markdown table; `--only` runs
some variants, `--seeds` repeats them with other draws of the calibration queries, and
`--set` changes parameters of all.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import chains  # noqa: E402
import evaluate  # noqa: E402

VARIANTS: dict[str, dict] = {
    "defaults": {},
    "layer": {"granularity": "layer"},
    "module": {"granularity": "module"},
    "tensor": {"granularity": "tensor"},
    "tensor, L-BFGS": {"granularity": "tensor", "solver": "lbfgs"},
    "row": {"granularity": "row"},
    "element": {"granularity": "element"},
    "rank 0": {"rank": 0},
    "rank 4": {"rank": 4},
    "rank 8": {"rank": 8},
    "rank 32": {"rank": 32},
    "prompt tokens weigh as others": {"prompt_weight": 1.0},
    "prompt tokens weigh nothing": {"prompt_weight": 0.0},
    "long share 0.5": {"long_share": 0.5},
    "long share 0.85": {"long_share": 0.85},
    "prompts only": {"tokens": "prompt"},
    "prompts only, element": {"tokens": "prompt", "granularity": "element"},
    "summed over tokens": {"alignment": "sum"},
    "embeddings and head averaged": {"outside_weight": 0.5},
    "initial weight 0.1": {"initial_weight": 0.1},
    "initial weight 0.3": {"initial_weight": 0.3},
    "initial weight 0.7": {"initial_weight": 0.7},
    "64 queries per pattern": {"queries_per_pattern": 64},
    "128 queries per pattern": {"queries_per_pattern": 128},
    "contrastive 0.01": {"contrastive_weight": 0.01},
    "contrastive 0.1": {"contrastive_weight": 0.1},
    "regularization 0.01": {"regularization": 0.01},
    "regularization 0.1": {"regularization": 0.1},
    "learning rate 0.01": {"learning_rate": 0.01},
    "learning rate 0.05": {"learning_rate": 0.05},
    "epochs 15": {"epochs": 15},
    "epochs 60": {"epochs": 60},
    "half of the layers": {"layers": 0.5},
    "preset paper": {"preset": "paper"},
    "preset qa-merging": {"preset": "qa-merging"},
}


def merge(experts: Path, parameters: dict, out: Path) -> float:
    """Merge the experts with `parameters` into `out`; return the seconds it took."""
    config = yaml.safe_load((QUICKSTART / "rpam.yml").read_text())
    config["base_model"] = str(experts / "long")
    config["models"] = [{"model": str(experts / "short")}]
    config["parameters"] = {
        **config["parameters"],
        "calibration": str(experts / "calibration.jsonl"),
        **parameters,
    }
    began = time.perf_counter()
    run_merge(
        MergeConfiguration.model_validate(config), str(out), MergeOptions(quiet=True)
    )
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=Path, default=QUICKSTART)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--queries", type=int, default=800)
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.experts / "long")
    queries = chains.queries(args.queries, "validation", seed=0)

    def measure(folder: Path, name: str) -> evaluate.Result:
        return evaluate.evaluate(evaluate.load(folder), tokenizer, queries, name)

    print(f"{len(queries)} validation queries, greedy decoding; seeds: {args.seeds}\n")
    print(
        "| variant | seed | accuracy | tokens | thinks at 1 .. 8 operations | seconds |"
    )
    print("|---|---|---|---|---|---|")
    for expert in ("long", "short"):
        print(row(measure(args.experts / expert, expert), "", ""), flush=True)
    for name in args.only:
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                parameters = {"seed": seed, **args.set, **VARIANTS[name]}
                seconds = merge(args.experts, parameters, Path(folder))
                result = measure(Path(folder), name)
                print(row(result, seed, f"{seconds:.0f}"), flush=True)


def row(result: evaluate.Result, seed, seconds) -> str:
    strata = result.by_difficulty.values()
    thinking = " ".join(f"{100 * s['thinking']:.0f}" for s in strata)
    return (
        f"| {result.name} | {seed} | {100 * result.accuracy:.1f} | {result.tokens:.2f} "
        f"| {thinking} | {seconds} |"
    )


if __name__ == "__main__":
    main()
