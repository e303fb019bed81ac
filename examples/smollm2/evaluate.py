"""Compare a merged model with its experts and their interpolation sweep.

    python examples/smollm2/evaluate.py examples/smollm2/out    # in the project's root

Every model answers the same held-out word problems greedily. Prints, and writes into
the merged model's folder under evaluation/: accuracy, tokens, the share that thinks and
the share of properly closed thinking, over all and by steps, with 95 % intervals; the
merged model against the sweep, its upper hull and a perfect router; the log odds of
opening the thinking; the log-likelihood of general English. What experts and sweep
answered is kept in cache/: evaluating another merged model does not ask them again.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import words
import yaml
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from neutral import log_likelihoods
from respond import Response, grade, kept, key_of, respond
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpam_mergekit.errors import refuse
from rpam_mergekit.evaluate import comparison_report as compare_report
from rpam_mergekit.evaluate.compare import Comparison, Model, compare_models
from rpam_mergekit.formats.coefficients import merge
from rpam_mergekit.models.adapters import (
    adapter_findings,
    merge_adapters,
    merged_folder,
)
from rpam_mergekit.text import aligned

HERE = Path(__file__).parent
# Finer where the responses turn from long to short.
WEIGHTS = (0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
EASY, HARD = (1,), (4, 5, 6)  # steps
Make = Callable[[], torch.nn.Module]


@dataclass
class Answered:
    """A model's role in the comparison and its responses, in the problems' order."""

    role: str
    name: str
    responses: list[Response]


class Bench:
    """Asks models the same problems, and keeps what they answered."""

    def __init__(self, problems: list[words.Problem], cache: Path) -> None:
        self.problems = problems
        self.cache = cache
        self.tokenizer = AutoTokenizer.from_pretrained(HERE / "base")

    def ask(self, role: str, name: str, folders: Sequence[Path], make: Make):
        """Return the responses of the model that `make` returns, made of `folders`."""
        print(f"{name} ...", flush=True)
        path = self.cache / f"{name.replace(' ', '-')}.json"
        key = key_of(folders, self.problems)
        responses = kept(
            path, key, lambda: respond(make(), self.tokenizer, self.problems)
        )
        return Answered(role, name, responses)

    def model(self, answered: Answered) -> Model:
        """Return a model of `compare`."""
        pairs = zip(self.problems, answered.responses, strict=True)
        figures = {("words", p.question): grade(p, r) for p, r in pairs}
        return Model(answered.name, answered.role, figures)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def interpolated(long: Path, short: Path, weight: float):
    """Return (1 - weight) * long + weight * short, rounded as checkpoints are."""
    model, other = load(long), load(short)
    others = dict(other.named_parameters())
    with torch.no_grad():
        for name, value in model.named_parameters():
            mixed = merge(value, [(torch.tensor(weight), others[name])])
            value.copy_(mixed.bfloat16().float())
    return model


def experts(config: Path, cache: Path) -> tuple[Path, Path]:
    """Return the folders of Long and Short that `config` names, made where missing.

    They are where mergekit keeps them: its `--lora-merge-cache` is `cache`.
    """
    recipe = yaml.safe_load(config.read_text(encoding="utf-8"))
    names = (recipe["base_model"], recipe["models"][0]["model"])
    references = [ModelReference.parse(name) for name in names]
    options = MergeOptions(lora_merge_cache=str(cache))
    for reference in references:  # an earlier adapter's experts are not these
        refuse(adapter_findings(reference, reference.config(), options))
    merge_adapters(references, options)
    long, short = (merged_folder(reference, options) for reference in references)
    return long, short


def ask_all(
    bench: Bench,
    long: Path,
    short: Path,
    merged: Path | None,
    weights: Sequence[float],
) -> list[Answered]:
    """Return what all models answered: Long, Short, merged if given, the sweep."""

    def mixed(weight: float) -> Make:
        return lambda: interpolated(long, short, weight)

    found = [
        bench.ask("long", "Long", [long], lambda: load(long)),
        bench.ask("short", "Short", [short], lambda: load(short)),
    ]
    if merged is not None:
        found.append(bench.ask("merged", "merged", [merged], lambda: load(merged)))
    for weight in weights:
        name = f"interpolated {weight:g}"
        found.append(bench.ask("sweep", name, [long, short], mixed(weight)))
    return found


def sweep_table(found: Comparison) -> list[str]:
    """Return accuracy, tokens and thinking of every model of the sweep, as lines."""
    rows = [["", "accuracy", "tokens", "thinks", "closes properly"]]
    for model in found.models:
        if model.role == "sweep":
            of = found.rows["words"][model.name]
            closed = of["closed"].value
            rows.append(
                [
                    model.name,
                    f"{of['accuracy'].value:.1%}",
                    f"{of['tokens'].value:.1f}",
                    f"{of['thinking'].value:.1%}",
                    "-" if closed is None else f"{closed:.1%}",
                ]
            )
    return aligned(rows)


def opening_table(bench: Bench, answered: Sequence[Answered]) -> list[str]:
    """Return the log odds of opening the thinking, by steps and model, as lines."""
    names = [str(steps) for steps in words.DIFFICULTIES]
    rows = [["log odds of opening, by steps", *names, "area"]]
    for one in answered:
        by: dict[int, list[float]] = {steps: [] for steps in words.DIFFICULTIES}
        for problem, response in zip(bench.problems, one.responses, strict=True):
            by[problem.difficulty].append(response.opening)
        means = [f"{fmean(odds):.1f}" for odds in by.values()]
        low, high = ([o for s in group for o in by[s]] for group in (EASY, HARD))
        rows.append([one.name, *means, f"{area(low, high):.2f}"])
    return [*aligned(rows), "area: under the curve between 4 to 6 steps and 1"]


def area(low: Sequence[float], high: Sequence[float]) -> float:
    """Return how often one of `high` is above one of `low`; ties count half."""
    pairs = [(h > x) + (h == x) / 2 for h in high for x in low]
    return fmean(pairs)


def english_table(
    bench: Bench, long: Path, short: Path, merged: Path | None
) -> list[str]:
    """Return the log-likelihood a token of neutral.jsonl, as lines."""
    makes: dict[str, Make] = {
        "base": lambda: load(HERE / "base"),
        "Long": lambda: load(long),
        "Short": lambda: load(short),
        "their average": lambda: interpolated(long, short, 0.5),
    }
    if merged is not None:
        makes["merged"] = lambda: load(merged)
    rows = [["log-likelihood a token of", "chat", "text", "all"]]
    for name, make in makes.items():
        found = log_likelihoods(make(), bench.tokenizer, HERE / "neutral.jsonl")
        rows.append([name, *(f"{value:.3f}" for value in found.values())])
    return aligned(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "merged",
        type=Path,
        nargs="?",
        help="folder of the merged model; without it, experts and sweep only",
    )
    parser.add_argument("--split", choices=words.SPLITS, default="test")
    parser.add_argument("--queries", type=int, default=360)
    parser.add_argument("--weights", type=float, nargs="*", default=WEIGHTS)
    parser.add_argument("--config", type=Path, default=HERE / "rpam.yml")
    parser.add_argument("--experts", type=Path, default=HERE / "experts")
    parser.add_argument("--cache", type=Path, default=HERE / "cache")
    args = parser.parse_args()
    long, short = experts(args.config, args.experts)
    bench = Bench(words.problems(args.queries, args.split, seed=0), args.cache)
    answered = ask_all(bench, long, short, args.merged, args.weights)
    found = compare_models([bench.model(one) for one in answered], by="steps")
    parts = [
        [f"{args.split}, greedy", compare_report.text(found)],
        sweep_table(found),
        opening_table(bench, answered),
        english_table(bench, long, short, args.merged),
    ]
    report = "\n\n".join("\n".join(lines) for lines in parts)
    print(f"\n{report}")
    if args.merged is not None:
        out = args.merged / "evaluation"
        compare_report.write(out, found)
        (out / "evaluation.txt").write_text(report + "\n", encoding="utf-8")
        write_responses(out / "responses.jsonl", bench, answered)
        print(f"\nwritten to {out}")


def write_responses(path: Path, bench: Bench, answered: Sequence[Answered]) -> None:
    """Write what Long, Short and the merged model said to every problem, by lines."""
    shown = [one for one in answered if one.role != "sweep"]
    with open(path, "w", encoding="utf-8") as file:
        for number, problem in enumerate(bench.problems):
            row = words.record(problem)
            row |= {one.name: one.responses[number].text for one in shown}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
