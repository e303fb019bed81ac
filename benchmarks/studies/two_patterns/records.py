"""The study's results, as the report asks for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from figures import Cell, Mix, cell
from tasks import TASKS, Task


class PairResults:
    """The records of one pair by group and name; RPAM merges also by seed.

    Of the checkpoints and settings that were measured last.
    """

    def __init__(self, path: Path) -> None:
        self.pair = path.stem
        self.task: Task = TASKS[self.pair.split("-")[0]]
        self.by_group: dict[str, dict[str, dict[str, Any]]] = {}
        self.by_seed: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        for record in records:
            if record["models"] != records[-1]["models"]:
                continue
            job = record["job"]
            if job["config"].get("merge_method") == "rpam":
                at = self.by_seed.setdefault((job["group"], job["name"]), {})
                at[job["seeds"][0]] = record
            else:
                self.by_group.setdefault(job["group"], {})[job["name"]] = record
        experts = self.by_group["experts"]
        self.long, self.short = experts["long"], experts["short"]
        sweep = self.by_group.get("sweep", {})
        self.sweep = [sweep[name] for name in sorted(sweep, key=float)]
        self.others = self.by_group.get("methods", {})

    @property
    def seeds(self) -> list[int]:
        return sorted(int(seed) for seed in self.long["sums"])

    @property
    def mix(self) -> Mix:
        return dict(zip(self.task.difficulties, self.task.mix, strict=True))

    @property
    def flat(self) -> Mix:
        return dict.fromkeys(self.task.difficulties, 1.0)

    @property
    def beyond(self) -> Mix:
        return dict.fromkeys(self.task.beyond, 1.0)

    def cells(self, group: str, name: str, mix: Mix) -> list[Cell]:
        """Return the cells of an RPAM merge, by seed."""
        others = list(self.others.values())
        found = sorted(self.by_seed[group, name].items())
        return [
            cell(merged, self.long, self.short, self.sweep, others, seed, mix)
            for seed, merged in found
        ]


def read(results: Path) -> list[PairResults]:
    """Return the results of all pairs."""
    found = sorted(results.glob("*.jsonl"), key=lambda path: path.stem)
    return [PairResults(path) for path in found]
