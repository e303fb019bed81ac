"""Train the quickstart's two experts: `python train.py` (about an hour on 2 cores).

Not needed to use them: the checkpoints lie beside this file. A base model first
learns both ways of answering the same queries. Long is fine-tuned from it on writing
every step; Short on answering at once, after more practice in both. Prompts of three
and more operations outside the `train` split are never seen. Seeded throughout;
rewrites `long/` and `short/`.
"""

import argparse
import copy
import random
from dataclasses import dataclass
from pathlib import Path

import chains
import torch
from tqdm import trange
from transformers import Qwen2Config, Qwen2ForCausalLM, get_cosine_schedule_with_warmup

HERE = Path(__file__).parent
# Short answers are learnt on more of the queries they can be learnt for.
SHORT_MIX = (2, 4, 8, 4, 1, 1, 1, 1)
SHORT_PRACTICE_MIX = (1, 1, 4, 6, 1, 1, 1, 1)
# Long chains need the most steps to be right.
LONG_PRACTICE_MIX = (1, 1, 1, 1, 1, 2, 2, 3)


@dataclass
class Stage:
    """One stage of training; ``rows``: by pattern, batches a step, their rows, mix."""

    starts_from: str | None
    rows: dict[str, tuple[int, int, tuple[int, ...]]]
    steps: int
    learning_rate: float


STAGES = {
    "base": Stage(
        None, {"long": (1, 24, (1,) * 8), "short": (4, 64, SHORT_MIX)}, 3500, 1.5e-3
    ),
    "practice": Stage(
        "base",
        {"long": (2, 24, LONG_PRACTICE_MIX), "short": (2, 64, SHORT_PRACTICE_MIX)},
        2000,
        1e-3,
    ),
    "long": Stage("base", {"long": (4, 16, LONG_PRACTICE_MIX)}, 1000, 3e-4),
    "short": Stage("practice", {"short": (4, 64, SHORT_PRACTICE_MIX)}, 300, 3e-4),
}


def new_model(tokenizer, seed: int) -> Qwen2ForCausalLM:
    """Return a Qwen2 model of 1.2 million random parameters."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batch(tokenizer, rows: int, pattern: str, mix, rng: random.Random):
    """Return a difficulty, ``input_ids`` and ``labels`` (rows, tokens) of it."""
    respond = chains.long_response if pattern == "long" else chains.short_response
    difficulty = rng.choices(chains.DIFFICULTIES, mix)[0]
    texts = []
    while len(texts) < rows:
        query = chains.draw(difficulty, rng)
        if chains.split(query) == "train":
            prompt = f"<|user|>{query}<|end|><|assistant|>"
            texts.append(prompt + respond(query) + "<|end|>")
    ids = torch.tensor(tokenizer(texts)["input_ids"])
    labels = ids.clone()
    labels[:, : 2 * difficulty + 5] = -100  # the prompt
    return difficulty, ids, labels


def train(model, tokenizer, name: str, stage: Stage, seed: int) -> None:
    """Train ``model`` in place."""
    rng = random.Random(f"{name}-{seed}")
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = get_cosine_schedule_with_warmup(optimiser, 100, stage.steps)
    model.train()
    losses = {}  # the latest of each pattern and difficulty
    progress = trange(stage.steps, desc=name)
    for _ in progress:
        for pattern, (batches, size, mix) in stage.rows.items():
            for _ in range(batches):
                difficulty, ids, labels = batch(tokenizer, size, pattern, mix, rng)
                loss = model(input_ids=ids, labels=labels).loss / batches
                loss.backward()
                losses[f"{pattern[0]}{difficulty}"] = f"{loss.item() * batches:.2f}"
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        progress.set_postfix(losses, refresh=False)
    model.eval()


def save(model, tokenizer, folder: Path) -> None:
    """Write ``model`` in bfloat16 with its tokenizer."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=STAGES,
        default=list(STAGES),
        help="stages to run; each but the first starts from another's folder in --out",
    )
    args = parser.parse_args()
    tokenizer = chains.build_tokenizer()
    for name in args.only:
        stage = STAGES[name]
        if stage.starts_from is None:
            model = new_model(tokenizer, args.seed)
        else:
            model = Qwen2ForCausalLM.from_pretrained(
                args.out / stage.starts_from, dtype=torch.float32
            )
        train(model, tokenizer, name, stage, args.seed)
        save(model, tokenizer, args.out / name)


if __name__ == "__main__":
    main()
