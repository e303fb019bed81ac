"""How much faster than the published procedure is the pre-pass, to the same end?

    python benchmarks/performance/speed.py [--quick]

Runs `_published.py` whole (50 epochs, prompts padded to 1024 tokens, both experts at
every step) on a pair of random checkpoints, then the pre-pass on the same pair, prompts
and objective (summed squared error and the same contrastive weight, prompts only), with
more and more epochs until it reaches the plain procedure's objective on held-out
queries. The ratio is taken there. Times are from the checkpoints on disk to the
coefficients, each run in a process of its own.

One evaluator judges both: transformers' own forward pass of the merged model, prompt by
prompt without padding, on prompts that neither has seen. The objective of a layer is
the squared distance to the positive expert's hidden states over all tokens, divided by
the experts' own; "reached" is a mean over layers and a last layer that are both no
higher than the plain procedure's.

`--quick` shortens both (a smaller pair, shorter prompts, three epochs): it shows that
the script works, its ratios say nothing.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _machine import Outcome, command_line, describe, own_process, spread, table
from _published import Plain, Published
from _random_pairs import fit_pair, prompts, small_config, write_pair
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from rpam_mergekit.formats.coefficients import CoefficientsFile

EPOCHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 50)
# What of ours differs from the plain procedure's, besides the number of epochs: its
# steps cost so little without padding that smaller batches pay.
WAYS: dict[str, dict[str, Any]] = {
    "element": {"granularity": "element", "batch_size": 4, "learning_rate": 0.03},
    "low_rank": {"granularity": "low_rank", "batch_size": 4, "learning_rate": 0.02},
    "tensor": {"granularity": "tensor", "batch_size": 8, "learning_rate": 0.05},
    "tensor by L-BFGS": {"granularity": "tensor", "solver": "lbfgs"},
}
FIRST_SEED = 200  # the ways were chosen on seeds 0, 100 and 101
HELD_OUT = 1000  # added to the seed of the prompts that nothing is solved on


@dataclass(frozen=True)
class Trial:
    """One pair and what is solved on it."""

    folder: Path
    seed: int
    per_pattern: int
    longest: int | None
    published: Published
    ladder: tuple[int, ...]

    @property
    def solution(self) -> Path:
        return self.folder / "solution.safetensors"

    def prompts(self, added: int = 0) -> list[tuple[list[int], str]]:
        return prompts(self.per_pattern, self.seed + added, self.longest)


def make(trial: Trial, hidden: int, layers: int) -> None:
    write_pair(
        trial.folder,
        small_config(hidden, layers),
        trial.per_pattern,
        seed=trial.seed,
        longest=trial.longest,
    )


def solve_plainly(trial: Trial, granularity: str) -> None:
    """Write the plain procedure's coefficient of every weight of the layers."""
    settings = replace(trial.published, granularity=granularity, seed=trial.seed)
    save_file(Plain(trial.folder, settings).run(trial.prompts()), trial.solution)


def solve(trial: Trial, way: str, epochs: int) -> None:
    """Make our coefficients file."""
    published = trial.published
    settings = {"preset": "paper", "seed": trial.seed, "epochs": epochs, **WAYS[way]}
    # The alignment of a batch is a sum over its prompts, the contrast a mean.
    share = settings.get("batch_size", published.batch_size) / published.batch_size
    omega = published.contrastive_weight * share
    fit_pair(trial.folder, out=trial.solution, contrastive_weight=omega, **settings)


def solution(path: Path) -> dict[str, torch.Tensor]:
    """Return the coefficients of the layers' weights: ours, the plain ones, or none."""
    if not path.exists():
        return {}
    with safe_open(path, framework="pt") as file:
        if not file.metadata():
            return {name: file.get_tensor(name) for name in file.keys()}
    ours = CoefficientsFile(path)
    inside = [name for name in ours.names if ".layers." in name]
    return {name: ours.coefficient(name, "cpu") for name in inside}


def objective(trial: Trial) -> list[float]:
    """Return the held-out objective of every layer of the merged model.

    Weights that the solution lacks, and all without one, are averaged.
    """
    coefficients = solution(trial.solution)
    models = {
        name: AutoModelForCausalLM.from_pretrained(
            trial.folder / source, dtype=torch.float32
        ).eval()
        for name, source in (("long", "long"), ("short", "short"), ("merged", "long"))
    }
    states: dict[str, list[torch.Tensor]] = {name: [] for name in models}
    other = models["short"].state_dict()
    with torch.no_grad():
        for name, weight in models["merged"].state_dict().items():
            share = coefficients.get(name, trial.published.initial_weight)
            weight.add_(share * (other[name] - weight))
        for name, model in models.items():
            for layer in model.model.layers:
                layer.register_forward_hook(
                    lambda _module, _input, output, kept=states[name]: kept.append(
                        output[0] if isinstance(output, tuple) else output
                    )
                )
        missed = torch.zeros(len(models["merged"].model.layers), dtype=torch.float64)
        apart = torch.zeros_like(missed)
        for ids, pattern in trial.prompts(HELD_OUT):
            for name, model in models.items():
                states[name].clear()
                model.model(input_ids=torch.tensor([ids]), use_cache=False)
            wrong = "short" if pattern == "long" else "long"
            found = zip(states["merged"], states[pattern], states[wrong], strict=True)
            for index, (merged, positive, negative) in enumerate(found):
                missed[index] += (merged - positive).double().square().sum()
                apart[index] += (negative - positive).double().square().sum()
    return (missed / apart).tolist()


def judged(trial: Trial, outcome: Outcome) -> tuple[float, float, float]:
    """Return seconds, and the held-out objective: mean over layers, last layer."""
    layers = own_process(objective, trial).value
    return outcome.seconds, sum(layers) / len(layers), layers[-1]


def compare(trial: Trial, wanted: list[str], rows: list[list[str]]) -> dict[str, float]:
    """Return the ratio of every way that reached the plain procedure's end."""
    _, mean, last = judged(trial, Outcome(None, 0, 0, 0, 0))
    rows.append([str(trial.seed), "one half everywhere", "", "", *_figures(mean, last)])
    plain, ratios = {}, {}
    for way in wanted:
        granularity = WAYS[way]["granularity"]
        if granularity not in plain:
            plain[granularity] = judged(
                trial, own_process(solve_plainly, trial, granularity)
            )
            epochs = str(trial.published.epochs)
            name = f"plain, {granularity}"
            rows.append(_row(trial, name, epochs, *plain[granularity]))
        aim = plain[granularity]
        for epochs in trial.ladder:
            outcome = own_process(solve, trial, way, epochs)
            seconds, mean, last = judged(trial, outcome)
            row = _row(trial, f"ours, {way}", str(epochs), seconds, mean, last)
            row.append(f"{aim[0] / seconds:.1f}")
            reached = mean <= aim[1] and last <= aim[2]
            row.append("yes" if reached else "no")
            rows.append(row)
            print("  ".join(row), flush=True)
            if reached:
                ratios[way] = aim[0] / seconds
                break
    return ratios


def _row(
    trial: Trial, name: str, epochs: str, seconds: float, mean: float, last: float
) -> list[str]:
    return [str(trial.seed), name, epochs, f"{seconds:.1f}", *_figures(mean, last)]


def _figures(mean: float, last: float) -> list[str]:
    return [f"{mean:.4f}", f"{last:.4f}"]


def main() -> None:
    args = command_line(
        __doc__,
        quick={
            "hidden": 32,
            "layers": 2,
            "per_pattern": 16,
            "plain_epochs": 3,
            "padded": 128,
            "repetitions": 1,
        },
        hidden=128,
        layers=4,
        per_pattern=(64, "queries"),
        plain_epochs=50,
        padded=1024,
        repetitions=(3, "pairs, by seed"),
        ways=(",".join(WAYS), "of ours"),
        folder=(Path, "for the pairs; kept"),
    )
    longest, ladder = (100, (1, 3, 12, 50)) if args.quick else (None, EPOCHS)
    # Omega is published for models 2560 wide; the summed error grows with the width.
    omega = round(1000 * args.hidden / 2560, 3)
    published = Published(
        epochs=args.plain_epochs, padded=args.padded, contrastive_weight=omega
    )
    rows: list[list[str]] = []
    every: list[dict[str, float]] = []
    wanted = args.ways.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(FIRST_SEED, FIRST_SEED + args.repetitions):
            folder = (args.folder or Path(temporary)) / f"pair-{seed}"
            trial = Trial(folder, seed, args.per_pattern, longest, published, ladder)
            own_process(make, trial, args.hidden, args.layers)
            every.append(compare(trial, wanted, rows))
    print(describe())
    print(
        f"pair {args.hidden} wide, {args.layers} layers; {args.per_pattern} prompts "
        f"per pattern; omega {omega}; plain: {args.plain_epochs} epochs, padded to "
        f"{args.padded} tokens, every layer and step run, nothing extrapolated"
    )
    if args.quick:
        print("SHORTENED by --quick: no result, only a test of this script")
    head = ["pair", "", "epochs", "seconds", "held-out objective", "last layer"]
    head += ["times faster", "reached"]
    print("\n" + table(head, [row + [""] * (len(head) - len(row)) for row in rows]))
    print(
        "\n"
        + table(
            ["", "times faster, median (least, most)", "pairs"],
            [
                [
                    name,
                    spread([r[name] for r in every if name in r], ".1f")
                    if any(name in r for r in every)
                    else "not reached",
                    f"{sum(name in r for r in every)} of {len(every)}",
                ]
                for name in wanted
            ],
        )
    )


if __name__ == "__main__":
    main()
