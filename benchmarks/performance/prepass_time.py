"""Is the pre-pass's time linear in tokens and in parameters?

    python benchmarks/performance/prepass_time.py [--plot time.png] [--quick]

Runs the pre-pass with three numbers of queries on one pair, and with three widths on
the same queries; several times each, interleaved, each run in a process of its own.
R^2 is that of a straight line through the medians; the ratio is the time per token (or
per parameter of a layer) of the largest against that of the smallest: 1 is linear, less
is cheaper. Attention's own cost grows with the square of the length of a prompt and is
small at the lengths of real ones, which do not change here.
"""

import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from _machine import command_line, describe, numbers, own_process, spread, table
from _random_pairs import fit_pair, small_config, write_pair

from rpam_mergekit.evaluate.plots import new_figure, save


@dataclass
class Point:
    """One size: what grows (tokens or parameters a layer), and seconds per run."""

    folder: Path
    axis: str
    size: int
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def make(folder: Path, hidden: int, layers: int, per_pattern: int) -> tuple[int, int]:
    """Write a pair and its queries; return tokens and parameters of a layer."""
    lengths = write_pair(folder, small_config(hidden, layers), per_pattern)
    tokens = sum(prompt for prompt, _ in lengths)
    head = hidden // max(hidden // 64, 2)
    heads = hidden // head
    attention = hidden * (2 * heads + 2 * (heads // 2)) * head
    return tokens, attention + 9 * hidden**2


def pre_pass(folder: Path, granularity: str, epochs: int) -> None:
    fit_pair(folder, granularity=granularity, epochs=epochs, tokens="prompt")


def straight(points: list[Point]) -> float:
    """Return the R^2 of the least squares line through the medians."""
    return (
        statistics.correlation(
            [float(p.size) for p in points], [p.median for p in points]
        )
        ** 2
    )


def rate_ratio(points: list[Point]) -> float:
    first, last = points[0], points[-1]
    return (last.median / last.size) / (first.median / first.size)


def draw(groups: dict[str, list[Point]], path: Path) -> None:
    figure, axes = new_figure((9, 3.5), columns=len(groups), dpi=120)
    for axis, (name, points) in zip(axes, groups.items(), strict=True):
        sizes = [p.size for p in points]
        for point in points:
            axis.plot([point.size] * len(point.seconds), point.seconds, "k.", ms=4)
        slope, start = statistics.linear_regression(sizes, [p.median for p in points])
        ends = [0, max(sizes)]
        axis.plot(ends, [start + slope * end for end in ends], lw=1)
        axis.set(xlabel=name, ylabel="seconds", xlim=(0, None), ylim=(0, None))
        axis.set_title(f"R² = {straight(points):.4f}", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


def main() -> None:
    args = command_line(
        __doc__,
        quick={
            "queries": "2,4,8",
            "widths": "128,256,384",
            "layers": 1,
            "epochs": 1,
            "repetitions": 1,
        },
        queries=("32,64,128", "per pattern"),
        widths=("256,384,512", "multiples of 128"),
        layers=2,
        granularity="low_rank",
        epochs=5,
        repetitions=3,
        plot=(Path, "the picture to write"),
    )
    queries, widths = numbers(args.queries), numbers(args.widths)
    groups: dict[str, list[Point]] = {"prompt tokens": [], "parameters a layer": []}
    with tempfile.TemporaryDirectory() as name:
        for count in queries:
            folder = Path(name) / f"tokens-{count}"
            sizes = own_process(make, folder, widths[1], args.layers, count).value
            groups["prompt tokens"].append(Point(folder, "queries", sizes[0]))
        for width in widths:
            folder = Path(name) / f"width-{width}"
            sizes = own_process(make, folder, width, args.layers, queries[1]).value
            groups["parameters a layer"].append(Point(folder, "width", sizes[1]))
        for _ in range(args.repetitions):
            for point in (p for points in groups.values() for p in points):
                arguments = (point.folder, args.granularity, args.epochs)
                point.seconds.append(own_process(pre_pass, *arguments).seconds)
    print(describe())
    print(
        f"{args.layers} layers, granularity {args.granularity}, {args.epochs} epochs, "
        f"{args.repetitions} runs; tokens at a width of {widths[1]}, parameters at "
        f"{queries[1]} queries per pattern; start-up of the libraries excluded"
    )
    for name, points in groups.items():
        rows = [
            [p.size, spread(p.seconds), f"{1e6 * p.median / p.size:.2f}"]
            for p in points
        ]
        head = [name, "seconds, median (least, most)", "microseconds each"]
        print("\n" + table(head, rows))
        print(
            f"\nR^2 {straight(points):.4f}; the largest takes {rate_ratio(points):.2f} "
            "times the smallest's time each"
        )
    if args.plot:
        draw(groups, args.plot)
        print(f"\nplot: {args.plot}")


if __name__ == "__main__":
    main()
