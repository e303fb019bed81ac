"""Compare a merged model with its experts and their interpolation sweep.

    python evaluate.py out            # needs the experts long/ and short/ beside it

Every model answers the same held-out queries greedily. Prints accuracy, mean response
tokens, the share of responses that think and the share of correctly closed thinking,
over all and by difficulty; writes results.json and, with matplotlib, results.png into
the merged model's folder. The sweep is the plain interpolation of the two experts, its
steps halved where its tokens or accuracy jump.
"""

import argparse
import copy
import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import chains
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpam_mergekit.errors import RpamError
from rpam_mergekit.evaluate.plots import new_figure, save
from rpam_mergekit.formats.coefficients import merge
from rpam_mergekit.grading.brackets import opening_of
from rpam_mergekit.grading.responses import Markers

HERE = Path(__file__).parent
MOST_NEW_TOKENS = 72
SMALLEST_STEP = 1 / 160


@dataclass
class Result:
    """What one model did on all queries; `by_difficulty` has the same per stratum."""

    name: str
    weight: float | None
    queries: int
    accuracy: float
    tokens: float
    thinking: float
    closed: float | None
    by_difficulty: dict[int, dict[str, float]]


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def interpolated(long, short, weight: float):
    """Return (1 - weight) * long + weight * short, rounded as checkpoints are."""
    model = copy.deepcopy(long)
    others = dict(short.named_parameters())
    with torch.no_grad():
        for name, value in model.named_parameters():
            mixed = merge(value, [(torch.tensor(weight), others[name])])
            value.copy_(mixed.bfloat16().float())
    return model


@torch.inference_mode()
def respond(
    model, tokenizer, queries: list[str], longest: int = MOST_NEW_TOKENS
) -> list[str]:
    """Return greedy responses of at most `longest` tokens, with their end token.

    They are whole turns: an opening of the thinking that the chat template wrote is
    theirs.
    """
    responses, markers = {}, Markers(chains.THINK, chains.END_THINK)
    for length in sorted({len(query) for query in queries}):
        # Prompts of one length need no padding.
        group = [query for query in queries if len(query) == length]
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": query}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for query in group
        ]
        prompt = tokenizer(texts, add_special_tokens=False, return_tensors="pt")
        output = model.generate(
            input_ids=prompt["input_ids"],
            attention_mask=torch.ones_like(prompt["input_ids"]),
            do_sample=False,
            max_new_tokens=longest,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[:, prompt["input_ids"].shape[1] :]
        opening = opening_of(texts[0], markers)
        for query, row in zip(group, output.tolist(), strict=True):
            kept = [token for token in row if token != tokenizer.pad_token_id]
            said = "".join(tokenizer.convert_ids_to_tokens(kept))
            responses[query] = opening + said
    return [responses[query] for query in queries]


def grade(answer: str, response: str) -> dict[str, float | None]:
    """Return 1 or 0 for correct, thinks and closed (well; None if it does not think).

    A response that thinks must close its thinking once and then answer; one that does
    not must be the answer.
    """
    end = "<|end|>"
    thinks = response.startswith(chains.THINK)
    _, closed, final = response.removesuffix(end).rpartition(chains.END_THINK)
    well_closed = thinks and response.count(chains.END_THINK) == 1 and bool(final)
    right = response.endswith(end) and final == answer
    return {
        "correct": float(right and (well_closed or not (thinks or closed))),
        "thinks": float(thinks),
        "closed": float(well_closed) if thinks else None,
    }


def evaluate(model, tokenizer, queries: list[str], name: str, weight=None) -> Result:
    responses = respond(model, tokenizer, queries)
    rows = [
        {
            "difficulty": chains.operations(query),
            "tokens": len(tokenizer(text, add_special_tokens=False)["input_ids"]),
            **grade(chains.answer(query), text),
        }
        for query, text in zip(queries, responses, strict=True)
    ]

    def mean(key: str, of: list[dict]) -> float | None:
        values = [row[key] for row in of if row[key] is not None]
        return sum(values) / len(values) if values else None

    strata = {d: [r for r in rows if r["difficulty"] == d] for d in chains.DIFFICULTIES}
    return Result(
        name,
        weight,
        len(rows),
        mean("correct", rows),
        mean("tokens", rows),
        mean("thinks", rows),
        mean("closed", rows),
        {
            d: {
                "accuracy": mean("correct", of),
                "tokens": mean("tokens", of),
                "thinking": mean("thinks", of),
            }
            for d, of in strata.items()
            if of
        },
    )


def sweep(long: Result, short: Result, measure) -> list[Result]:
    """Return the sweep from weight 0 to 1, finer where neighbours differ much."""
    points = {0.0: long, 1.0: short}
    for weight in [w / 10 for w in range(1, 10)]:
        points[weight] = measure(weight)
    while True:
        ordered = sorted(points)
        gaps = [
            (a + b) / 2
            for a, b in itertools.pairwise(ordered)
            if b - a > SMALLEST_STEP
            and (
                abs(points[a].tokens - points[b].tokens) > 0.06 * long.tokens
                or abs(points[a].accuracy - points[b].accuracy) > 0.05
            )
        ]
        if not gaps:
            return [points[w] for w in ordered]
        for weight in gaps:
            points[weight] = measure(weight)


def at_tokens(points: list[Result], tokens: float) -> float:
    """Return the best accuracy the sweep's curve reaches at a mean token count."""
    best = 0.0
    for a, b in itertools.pairwise(points):
        low, high = sorted((a, b), key=lambda r: r.tokens)
        if low.tokens <= tokens <= high.tokens:
            share = (tokens - low.tokens) / max(high.tokens - low.tokens, 1e-9)
            best = max(best, low.accuracy + share * (high.accuracy - low.accuracy))
    return best


def hull_at_tokens(points: list[Result], tokens: float) -> float:
    """Return the best accuracy of randomly mixing two models of the sweep."""
    best = 0.0
    for a in points:
        for b in points:
            if a.tokens <= tokens <= b.tokens:
                best = max(best, at_tokens([a, b], tokens))
    return best


def equally_frequent(result: Result) -> Result:
    """Return the result as if every difficulty were equally frequent."""
    strata = result.by_difficulty.values()
    return replace(
        result,
        accuracy=sum(s["accuracy"] for s in strata) / len(strata),
        tokens=sum(s["tokens"] for s in strata) / len(strata),
    )


def router(long: Result, short: Result) -> tuple[float, float]:
    """Return accuracy and tokens of choosing the cheaper adequate expert by difficulty.

    It knows the difficulty only: Short where its accuracy is within 0.1 of Long's.
    """
    accuracy = tokens = 0.0
    for difficulty, weight in zip(chains.DIFFICULTIES, chains.MIX, strict=True):
        a, b = long.by_difficulty[difficulty], short.by_difficulty[difficulty]
        chosen = b if b["accuracy"] >= a["accuracy"] - 0.1 else a
        accuracy += weight / sum(chains.MIX) * chosen["accuracy"]
        tokens += weight / sum(chains.MIX) * chosen["tokens"]
    return accuracy, tokens


def table(results: list[Result]) -> str:
    lines = [
        f"{'':22}{'accuracy':>9}{'tokens':>8}{'thinks':>8}{'closed':>8}   "
        "share that thinks at 1 .. 8 operations"
    ]
    for r in results:
        closed = "-" if r.closed is None else f"{r.closed:.1%}"
        by = " ".join(f"{r.by_difficulty[d]['thinking']:4.0%}" for d in r.by_difficulty)
        lines.append(
            f"{r.name:22}{r.accuracy:9.1%}{r.tokens:8.2f}{r.thinking:8.1%}"
            f"{closed:>8}   {by}"
        )
    return "\n".join(lines)


def accuracy_table(results: list[Result]) -> str:
    lines = [f"{'':22}accuracy at 1 .. 8 operations"]
    for r in results:
        by = " ".join(f"{r.by_difficulty[d]['accuracy']:4.0%}" for d in r.by_difficulty)
        lines.append(f"{r.name:22}{by}")
    return "\n".join(lines)


def plot(path: Path, merged: Result, points: list[Result], perfect) -> None:
    figure, axes = new_figure((7, 4.4), dpi=130)
    axes.plot(
        [p.tokens for p in points],
        [100 * p.accuracy for p in points],
        "o-",
        color="0.55",
        markersize=4,
        label="interpolation sweep",
    )
    for result, marker, colour in (
        (points[0], "s", "#0072B2"),
        (points[-1], "^", "#009E73"),
        (merged, "*", "#D55E00"),
    ):
        axes.plot(
            result.tokens,
            100 * result.accuracy,
            marker,
            color=colour,
            markersize=18 if marker == "*" else 10,
            label=result.name,
            linestyle="none",
        )
    axes.plot(
        perfect[1], 100 * perfect[0], "x", color="black", label="router by difficulty"
    )
    axes.set_xlabel("mean response tokens")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("merged", type=Path, help="folder of the merged model")
    parser.add_argument("--experts", type=Path, default=HERE, help="of long/, short/")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--queries", type=int, default=1200)
    parser.add_argument("--no-sweep", action="store_true")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.experts / "long")
    queries = chains.queries(args.queries, args.split, seed=0)
    long_model, short_model = load(args.experts / "long"), load(args.experts / "short")
    progress = tqdm(desc="evaluating", unit="model")

    def measure(model, name: str, weight=None) -> Result:
        result = evaluate(model, tokenizer, queries, name, weight)
        progress.update()
        return result

    long = measure(long_model, "Long", 0.0)
    short = measure(short_model, "Short", 1.0)
    merged = measure(load(args.merged), "merged with rpam")
    points = [long, short]
    if not args.no_sweep:
        points = sweep(
            long,
            short,
            lambda w: measure(
                interpolated(long_model, short_model, w), f"interpolated {w:.4f}", w
            ),
        )
    progress.close()
    perfect = router(long, short)
    everything = [*points, merged]
    print(f"\n{len(queries)} held-out queries ({args.split}), greedy decoding\n")
    print(table(everything), "\n")
    print(accuracy_table([long, short, merged]), "\n")
    print(f"router by difficulty: {perfect[0]:.1%} at {perfect[1]:.2f} tokens")
    error = (merged.accuracy * (1 - merged.accuracy) / merged.queries) ** 0.5
    print(
        f"merged: {merged.accuracy / long.accuracy:.1%} of Long's accuracy "
        f"(standard error {error:.1%}) with {merged.tokens / long.tokens:.1%} of its "
        "tokens"
    )
    curve = at_tokens(points, merged.tokens)
    hull = hull_at_tokens(points, merged.tokens)
    if not args.no_sweep:
        print(
            f"sweep at {merged.tokens:.2f} tokens: {curve:.1%}; its upper hull (random "
            f"mixing of its models): {hull:.1%}"
        )
        level, levels = equally_frequent(merged), [equally_frequent(p) for p in points]
        print(
            f"were all difficulties equally frequent: merged {level.accuracy:.1%} at "
            f"{level.tokens:.2f} tokens (Long {levels[0].accuracy:.1%} at "
            f"{levels[0].tokens:.2f}), sweep {at_tokens(levels, level.tokens):.1%}, "
            f"hull {hull_at_tokens(levels, level.tokens):.1%}"
        )
    report = {
        "split": args.split,
        "queries": len(queries),
        "merged": asdict(merged),
        "sweep": [asdict(p) for p in points],
        "router": {"accuracy": perfect[0], "tokens": perfect[1]},
        "sweep_at_tokens": curve,
        "hull_at_tokens": hull,
    }
    path = args.merged / "results.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    try:
        plot(args.merged / "results.png", merged, points, perfect)
        print(f"picture: {args.merged / 'results.png'}")
    except RpamError as error:
        print(f"no picture: {error}")


if __name__ == "__main__":
    main()
