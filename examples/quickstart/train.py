"""Train the quickstart's two experts: `python train.py` (under an hour on 2 cores).

Not needed to use them: the checkpoints lie beside this file. A base model first
learns both ways of answering the same queries; each expert is then fine-tuned from
the saved base on one of them. Prompts of three and more operations outside the
`train` split are never seen. Seeded throughout; rewrites `long/` and `short/`.
"""

import argparse
import copy
import random
from pathlib import Path

import chains
import torch
from tqdm import trange
from transformers import Qwen2Config, Qwen2ForCausalLM, get_cosine_schedule_with_warmup

HERE = Path(__file__).parent
# Short answers are learnt on more of the queries they can be learnt for.
SHORT_MIX = (2, 4, 8, 4, 1, 1, 1, 1)
# Long chains need the most steps to be right; the base sees all alike.
LONG_MIX = (1, 1, 1, 1, 1, 2, 2, 3)


def new_model(tokenizer, seed: int) -> Qwen2ForCausalLM:
    """Return a Qwen2 model of 1.3 million random parameters."""
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


def train(model, tokenizer, name: str, rows: dict, steps: int, lr: float, seed: int):
    """Train ``model`` in place; ``rows``: batches, their rows and mix, by pattern."""
    rng = random.Random(f"{name}-{seed}")
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = get_cosine_schedule_with_warmup(optimiser, min(100, steps // 5), steps)
    model.train()
    losses = {}  # the latest of each pattern and difficulty
    progress = trange(steps, desc=name)
    for _ in progress:
        for pattern, (batches, size, mix) in rows.items():
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
    parser.add_argument("--base-steps", type=int, default=3500)
    parser.add_argument("--long-steps", type=int, default=1000)
    parser.add_argument("--short-steps", type=int, default=400)
    parser.add_argument("--expert-lr", type=float, default=3e-4)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("base", "long", "short"),
        default=("base", "long", "short"),
        help="stages to run; the experts start from base/ in the output folder",
    )
    args = parser.parse_args()
    tokenizer = chains.build_tokenizer()
    if "base" in args.only:
        base = new_model(tokenizer, args.seed)
        both = {"long": (1, 24, (1,) * 8), "short": (4, 64, SHORT_MIX)}
        train(base, tokenizer, "base", both, args.base_steps, 1.5e-3, args.seed)
        save(base, tokenizer, args.out / "base")
    experts = {
        "long": ((4, 16, LONG_MIX), args.long_steps),
        "short": ((4, 64, SHORT_MIX), args.short_steps),
    }
    for pattern, (rows, steps) in experts.items():
        if pattern in args.only:
            expert = Qwen2ForCausalLM.from_pretrained(
                args.out / "base", dtype=torch.float32
            )
            lr = args.expert_lr
            train(expert, tokenizer, pattern, {pattern: rows}, steps, lr, args.seed)
            save(expert, tokenizer, args.out / pattern)


if __name__ == "__main__":
    main()
