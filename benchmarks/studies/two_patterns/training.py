"""Build the study's pairs of experts, in hours.

    python benchmarks/studies/two_patterns/training.py [PAIR ...]

Trains the stages of a pair from scratch and makes its calibration file, by
`mergekit-rpam sample` and `label`. Seeded, one thread; a finished stage is not trained
again.
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
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from pairs import PAIRS, Pair, Stage
from tasks import END, Task, chains, prompt
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
            max_position_embeddings=pair.positions,
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
    opening = stage.template.opening
    found = [
        (way, prompt(asked) + opening, said.removeprefix(opening) + END)
        for way, asked, said in found
    ]
    return sorted(found, key=lambda row: len(row[1] + row[2]))


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
    """Train `model` in place, with float32 parameters.

    Computes in bfloat16 where the CPU can; elsewhere that is three times as slow.
    """
    stage = pair.stages[name]
    rng = random.Random(f"{pair.name}-{name}-{seed}")
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    warm = min(100, stage.steps // 10)
    bfloat16 = torch.cpu._is_avx512_bf16_supported()
    schedule = get_cosine_schedule_with_warmup(optimiser, warm, stage.steps)
    model.train()
    progress = trange(stage.steps, desc=f"{pair.name} {name}", mininterval=5)
    for _ in progress:
        texts = rows(pair.task, stage, rng)
        seen: dict[str, list[float]] = {}
        for ways, ids, mask, labels in batches(tokenizer, texts, parts=3):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
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
                pair.stage_path(stage.starts_from),
                dtype=torch.float32,
                max_position_embeddings=pair.positions,
            )
        tokenizer.chat_template = stage.template.text
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
    if pair.labels is not None:
        relabel(pair, pair.labels)
        return
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


def relabel(pair: Pair, labels: Path) -> None:
    """Write the calibration file of a pair whose labels are those of another.

    What Long answers, greedily, takes the place of the `long` queries' responses; a
    query that it answers wrongly is left out.
    """
    from measure import grade, load, respond  # which needs what `tasks` makes known

    records = [json.loads(line) for line in labels.read_text().splitlines()]
    asked = [r["prompt"] for r in records if r["pattern"] == "long"]
    model, tokenizer = load(pair.path / "long")
    said = respond(model, tokenizer, asked, pair.task.longest_response)
    responses = dict(zip(asked, said, strict=True))
    with open(pair.cache / "calibration.jsonl", "w", encoding="utf-8") as file:
        for record in records:
            if record["pattern"] == "long":
                response = responses[record["prompt"]]
                if not grade(record["answer"], response)["correct"]:
                    continue
                record = {
                    key: record[key] for key in ("prompt", "pattern", "answer")
                } | {"response": response.removesuffix(END)}
            file.write(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="*", metavar="PAIR", help=", ".join(PAIRS))
    for name in parser.parse_args().pairs or PAIRS:
        build(PAIRS[name])
        calibrate(PAIRS[name])


if __name__ == "__main__":
    main()
