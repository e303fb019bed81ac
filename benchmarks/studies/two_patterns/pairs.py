"""The study's pairs of experts: tasks, architectures, sizes, stages of training.

A pair is a Long-CoT and a Short-CoT model of one architecture. A base model first
learns both ways of answering; the experts are fine-tuned from it. `training.py` builds
them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from tasks import CHAINS, GRAPH, PRODUCTS, RESTATED, ROOT, Task
from templates import PLAIN, QWEN, R1, Template

QUICKSTART = ROOT / "examples" / "quickstart"
SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6}
LARGE = {"hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 8}


def cache() -> Path:
    """Return where the study keeps what it builds: $RPAM_LAB, or cache/ beside this."""
    return Path(os.environ.get("RPAM_LAB", Path(__file__).parent / "cache"))


@dataclass(frozen=True)
class Stage:
    """One stage of training; one of no steps is the weights it starts from.

    starts_from: a stage of the same pair, PAIR/STAGE of another, or a folder.
    rows: by way of answering, the rows of a step and how often each difficulty is among
    them. chat: rows of a step that are no queries, which every stage answers alike.
    template: of the chat. An opening it writes is of the prompt: no loss is on it.
    """

    starts_from: str | None
    rows: dict[str, tuple[int, tuple[float, ...]]]
    steps: int
    learning_rate: float
    chat: int = 16
    template: Template = PLAIN


def unchanged(way: str, template: Template = PLAIN) -> Stage:
    """Return the stage that is one of the quickstart's experts, not trained on."""
    return Stage(str(QUICKSTART / way), {}, 0, 0.0, 0, template)


@dataclass(frozen=True)
class Pair:
    """A pair and how it is trained; `about` says what makes it different.

    positions: the longest prompt and response together, in tokens.
    labels: a calibration file whose queries and labels are the pair's, too; None: they
    are sampled.
    """

    name: str
    task: Task
    architecture: str
    about: str
    size: dict[str, int] = field(default_factory=lambda: SMALL)
    stages: dict[str, Stage] = field(default_factory=dict)
    folder: Path | None = None
    positions: int = 256
    labels: Path | None = None

    @property
    def chats(self) -> bool:
        """Whether the experts were taught to answer what is no query."""
        return any(stage.chat for stage in self.stages.values())

    @property
    def cache(self) -> Path:
        return cache() / self.name

    @property
    def path(self) -> Path:
        """The folder with long/ and short/."""
        return self.folder or self.cache

    @property
    def ancestor(self) -> Path | None:
        """The folder of the base both experts were fine-tuned from, if it is kept."""
        origins = {
            self.stages[way].starts_from for way in ("long", "short") if self.stages
        }
        return self.stage_path(origins.pop() or "") if len(origins) == 1 else None

    def stage_path(self, stage: str) -> Path:
        """Return the folder of a stage, also of another pair's (PAIR/STAGE)."""
        return cache() / stage if "/" in stage else self.path / stage


FLAT = (1, 1, 1, 1, 1, 1)
EASY = (2, 4, 4, 1, 0, 0)
# As the quickstart trains its Long: long chains need the most steps to be right.
HARD = (1, 1, 1, 1, 1, 2, 2, 3)
PAIRS = {
    pair.name: pair
    for pair in (
        Pair(
            "chains-qwen2",
            CHAINS,
            "qwen2",
            "the quickstart's pair",
            folder=QUICKSTART,
        ),
        Pair(
            "products-llama",
            PRODUCTS,
            "llama",
            "experts from one base",
            stages={
                "base": Stage(
                    None,
                    {"long": (96, FLAT), "short": (160, (1, 4, 4, 1, 1, 1))},
                    1000,
                    1.5e-3,
                ),
                "long": Stage("base", {"long": (96, (1, 1, 1, 2, 2, 2))}, 300, 3e-4),
                "short": Stage("base", {"short": (192, (1, 4, 6, 1, 0, 0))}, 400, 5e-4),
            },
        ),
        Pair(
            "graph-qwen3",
            GRAPH,
            "qwen3",
            "difficulty does not show in the prompt's length",
            stages={
                "base": Stage(
                    None,
                    {"long": (96, FLAT), "short": (128, EASY)},
                    2500,
                    1.5e-3,
                ),
                "long": Stage("base", {"long": (96, FLAT)}, 500, 3e-4),
                "short": Stage("base", {"short": (160, EASY)}, 800, 5e-4),
            },
        ),
        Pair(
            "products-llama-apart",
            PRODUCTS,
            "llama",
            "experts from one base by other data and high learning rates",
            stages={
                "long": Stage(
                    "products-llama/base",
                    {"long": (96, (1, 1, 1, 3, 3, 3))},
                    500,
                    1.5e-3,
                ),
                "short": Stage(
                    "products-llama/base",
                    {"short": (192, (2, 4, 4, 0, 0, 0))},
                    500,
                    2e-3,
                ),
            },
        ),
        Pair(
            "products-qwen2-10m",
            PRODUCTS,
            "qwen2",
            "ten million parameters",
            size=LARGE,
            stages={
                "base": Stage(
                    None,
                    {"long": (40, FLAT), "short": (64, (1, 4, 4, 1, 1, 1))},
                    600,
                    1e-3,
                ),
                "long": Stage("base", {"long": (48, (1, 1, 1, 2, 3, 4))}, 400, 5e-4),
                "short": Stage("base", {"short": (96, (1, 4, 6, 1, 0, 0))}, 200, 3e-4),
            },
        ),
        Pair(
            "chains-unopened",
            CHAINS,
            "qwen2",
            "Long is Short, trained on after prompts that open its thinking",
            stages={
                "long": Stage(
                    str(QUICKSTART / "short"), {"long": (32, HARD)}, 200, 3e-4, 0, R1
                ),
                "short": unchanged("short"),
            },
        ),
        Pair(
            "chains-long",
            RESTATED,
            "qwen2",
            "responses of several hundred tokens",
            stages={
                "long": Stage(
                    str(QUICKSTART / "long"), {"long": (12, (1,) * 8)}, 800, 7e-4, 0
                ),
                "short": unchanged("short"),
            },
            positions=576,
            labels=QUICKSTART / "calibration.jsonl",
        ),
        Pair(
            "chains-opened-r1",
            CHAINS,
            "qwen2",
            "the quickstart's weights, Long's template opens the thinking as R1's",
            stages={"long": unchanged("long", R1), "short": unchanged("short")},
        ),
        Pair(
            "chains-opened-qwen",
            CHAINS,
            "qwen2",
            "the quickstart's weights, Long's template opens the thinking as Qwen's",
            stages={"long": unchanged("long", QWEN), "short": unchanged("short")},
        ),
    )
}
# The pairs of docs/evidence.md; the others each pose one question more.
STUDIED = (
    "chains-qwen2",
    "products-llama",
    "graph-qwen3",
    "products-llama-apart",
    "products-qwen2-10m",
)
