"""Build the lab's pairs of experts: `python benchmarks/lab/pairs.py` (hours).

A pair is a Long-CoT and a Short-CoT model of one architecture, trained from scratch on
one task, plus a calibration file made by `mergekit-rpam sample` and `label`. A base
model first learns both ways of answering; the experts are fine-tuned from it or from
each other's stages. Seeded, one thread; a finished stage is not trained again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from tasks import CHAINS, END, GRAPH, PRODUCTS, ROOT, Task, chains
from tqdm import trange
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_cosine_schedule_with_warmup,
)

QUERIES = 400  # of each difficulty, from which the calibration set is drawn
ARCHITECTURES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6}
LARGE = {"hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 8}


def cache() -> Path:
    """Return where the lab keeps what it builds: $RPAM_LAB, or cache/ beside this."""
    return Path(os.environ.get("RPAM_LAB", Path(__file__).parent / "cache"))


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    starts_from: a stage of the same pair, or PAIR/STAGE of another.
    rows: by way of answering, the rows of a step and how often each difficulty is among
    them. chat: rows of a step that are no queries, which every stage answers alike.
    """

    starts_from: str | None
    rows: dict[str, tuple[int, tuple[float, ...]]]
    steps: int
    learning_rate: float
    chat: int = 16


@dataclass(frozen=True)
class Pair:
    """A pair and how it is trained; `about` says what makes it different."""

    name: str
    task: Task
    architecture: str
    about: str
    size: dict[str, int] = field(default_factory=lambda: SMALL)
    stages: dict[str, Stage] = field(default_factory=dict)
    folder: Path | None = None

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
PAIRS = {
    pair.name: pair
    for pair in (
        Pair(
            "chains-qwen2",
            CHAINS,
            "qwen2",
            "the quickstart's pair",
            folder=ROOT / "examples" / "quickstart",
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
    )
}


def new_model(pair: Pair, tokenizer, seed: int) -> PreTrainedModel:
    """Return a model of random parameters."""
    torch.manual_seed(seed)
    config, model = ARCHITECTURES[pair.architecture]
    heads = pair.size["hidden_size"] // 32
    return model(
        config(
            vocab_size=len(tokenizer),
            **pair.size,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=32,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def rows(task: Task, stage: Stage, rng: random.Random) -> list[tuple[str, str, str]]:
    """Return one step's (way, prompt, response), of the `train` split only."""
    found = []
    for way, (count, mix) in stage.rows.items():
        respond = task.long_response if way == "long" else task.short_response
        wanted = len(found) + count
        while len(found) < wanted:
            difficulty = rng.choices(task.difficulties, mix)[0]
            query = task.draw(difficulty, rng)
            if task.split(query) == "train":
                found.append((way, query, respond(query)))
    found += [("chat", *task.chat(rng)) for _ in range(stage.chat)]
    found = [(way, prompt(asked), said + END) for way, asked, said in found]
    return sorted(found, key=lambda row: len(row[1] + row[2]))


def prompt(query: str) -> str:
    """Return the query as the chat template writes it."""
    return f"<|user|>{query}<|end|><|assistant|>"


def batches(tokenizer, texts: list[tuple[str, str, str]], parts: int):
    """Yield `parts` padded batches: ways, input_ids, attention_mask, labels.

    The tensors are (rows, tokens); prompts and padding are not to be predicted.

    Rows come sorted by length, so that little is padded.
    """
    size = -(-len(texts) // parts)
    for at in range(0, len(texts), size):
        part = texts[at : at + size]
        prompts = tokenizer([p for _, p, _ in part])["input_ids"]
        whole = tokenizer(
            [p + r for _, p, r in part], return_tensors="pt", padding=True
        )
        labels = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, -100)
        for row, asked in zip(labels, prompts, strict=True):
            row[: len(asked)] = -100
        ways = [way for way, _, _ in part]
        yield ways, whole["input_ids"], whole["attention_mask"], labels


def train(model, tokenizer, pair: Pair, name: str, seed: int) -> None:
    """Train `model` in place, computing in bfloat16 with float32 parameters."""
    stage = pair.stages[name]
    rng = random.Random(f"{pair.name}-{name}-{seed}")
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    warm = min(100, stage.steps // 10)
    schedule = get_cosine_schedule_with_warmup(optimiser, warm, stage.steps)
    model.train()
    progress = trange(stage.steps, desc=f"{pair.name} {name}", mininterval=5)
    for _ in progress:
        texts = rows(pair.task, stage, rng)
        seen: dict[str, list[float]] = {}
        for ways, ids, mask, labels in batches(tokenizer, texts, parts=3):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=ids, attention_mask=mask).logits
            # Every response weighs the same, whatever its length.
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1),
                labels[:, 1:].flatten(),
                reduction="none",
            ).view(len(labels), -1)
            per_row = losses.sum(1) / (labels[:, 1:] != -100).sum(1)
            loss = per_row.sum() / len(texts)
            loss.backward()
            for way, value in zip(ways, per_row.tolist(), strict=True):
                seen.setdefault(way, []).append(value)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        means = {way: f"{sum(v) / len(v):.3f}" for way, v in sorted(seen.items())}
        progress.set_postfix(means, refresh=False)
    model.eval()


def save(model, tokenizer, folder: Path) -> None:
    """Write `model` in bfloat16 with its tokenizer; appears only when whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def build(pair: Pair, seed: int = 0) -> None:
    """Train the stages that are not there yet."""
    torch.set_num_threads(1)
    tokenizer = chains.build_tokenizer(pair.task.characters)
    model_class = ARCHITECTURES[pair.architecture][1]
    for name, stage in pair.stages.items():
        folder = pair.path / name
        if (folder / "config.json").exists():
            continue
        if stage.starts_from is None:
            model = new_model(pair, tokenizer, seed)
        else:
            model = model_class.from_pretrained(
                pair.stage_path(stage.starts_from), dtype=torch.float32
            )
        train(model, tokenizer, pair, name, seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        save(model, tokenizer, folder)


def calibrate(pair: Pair) -> None:
    """Sample both experts' responses and label the queries, as a user would.

    Queries of the `train` split, every difficulty equally frequent.
    """
    if (pair.cache / "calibration.jsonl").exists():
        return
    pair.cache.mkdir(parents=True, exist_ok=True)
    task, questions = pair.task, pair.cache / "questions.jsonl"
    flat = dict.fromkeys(task.difficulties, 1.0)
    with open(questions, "w", encoding="utf-8") as file:
        for query in task.queries(QUERIES * len(flat), "train", 1, flat):
            record = {
                "question": query,
                "answer": task.answer(query),
                "difficulty": task.difficulty(query),
            }
            file.write(json.dumps(record) + "\n")
    command = [str(Path(sys.executable).parent / "mergekit-rpam")]
    samples = [str(pair.cache / f"{way}.samples.jsonl") for way in ("long", "short")]
    for way, out in zip(("long", "short"), samples, strict=True):
        sample = [*command, "sample", str(pair.path / way), "--out", out]
        sample += ["--dataset", str(questions), "-k", "8", "--temperature", "1"]
        sample += ["--top-p", "1", "--max-tokens", str(task.longest_response)]
        subprocess.run(
            [*sample, "--dtype", "float32", "--batch-size", "256"], check=True
        )
    calibration = str(pair.cache / "calibration.jsonl")
    label = [*command, "label", *samples, "--out", calibration]
    subprocess.run([*label, "--per-pattern", "512", "--by", "difficulty"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="*", metavar="PAIR", help=", ".join(PAIRS))
    for name in parser.parse_args().pairs or PAIRS:
        build(PAIRS[name])
        calibrate(PAIRS[name])


if __name__ == "__main__":
    main()
