"""Train the two experts: `python train.py long`, then `python train.py short`.

Not needed to use them: the adapters lie beside this file. A LoRA adapter of rank 8 on
every linear layer of base/ learns the responses of words.py, of problems in the split
`train` only. Short starts from Long's adapter, as published pairs have one ancestor
that could do both: trained from the base on its own, it lies so far from Long that a
fifth of it breaks Long. One CPU thread, float32, seeded; saved in bfloat16.

All examples of a step share one row of tokens: what their prompts begin with in common
(the system turn) stands there once, and each example sees it and itself only. That
gives the loss of one row each, at a third of the tokens for short examples.
"""

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import words
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
RANK = 8
Example = tuple[list[int], list[int]]  # tokens of prompt and response


@dataclass(frozen=True)
class Recipe:
    """How an expert is trained; `mix` weighs the difficulties.

    The learning rate falls so that it would be at its lowest after `decay` steps.
    """

    steps: int
    decay: int
    batch: int
    learning_rate: float
    mix: tuple[float, ...]
    starts_from: str | None = None  # whose adapter; None: a new one


RECIPES = {
    "long": Recipe(200, 240, 4, 1.5e-3, (1, 1, 1.5, 1.5, 2, 2)),
    "short": Recipe(120, 120, 12, 6e-4, (10, 4, 0.5, 0.5, 0.5, 0.5), "long"),
}
RESPONSES = {"long": words.long_response, "short": words.short_response}


@dataclass
class Packed:
    """Examples in one row: model inputs, and where which token is to be predicted."""

    inputs: dict[str, torch.Tensor]
    at: torch.Tensor
    target: torch.Tensor
    lengths: list[int]  # of the responses


def encode(tokenizer, problem: words.Problem, pattern: str) -> Example:
    """Return the tokens of a prompt, and of the response with its end token."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.question}],
        add_generation_prompt=True,
        return_dict=False,
    )
    text = RESPONSES[pattern](problem)
    response = tokenizer(text, add_special_tokens=False)["input_ids"]
    return prompt, [*response, tokenizer.eos_token_id]


def common_start(rows: list[list[int]]) -> int:
    """Return how many tokens all rows begin with in common."""
    shortest = min(len(row) for row in rows)
    equal = (len({row[n] for row in rows}) == 1 for n in range(shortest))
    return next((n for n, same in enumerate(equal) if not same), shortest)


def pack(examples: list[Example]) -> Packed:
    """Put `examples` into one row, behind what their prompts begin with in common."""
    shared = common_start([prompt for prompt, _ in examples])
    ids = examples[0][0][:shared]
    positions, owner = list(range(shared)), [0] * shared
    at, target = [], []
    for number, (prompt, response) in enumerate(examples, 1):
        own = [*prompt[shared:], *response[:-1]]  # after the last nothing follows
        first = len(ids) + len(prompt) - shared - 1  # predicts the response's first
        at += range(first, first + len(response))
        target += response
        ids = ids + own
        positions += range(shared, shared + len(own))
        owner += [number] * len(own)
    group = torch.tensor(owner)
    seen = (group[:, None] == group[None]) | (group[None] == 0)
    return Packed(
        {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "attention_mask": seen.tril()[None, None],
        },
        torch.tensor(at),
        torch.tensor(target),
        [len(response) for _, response in examples],
    )


def predict(model, packed: Packed) -> torch.Tensor:
    """Return the logits (predicted tokens, vocabulary)."""
    inner = model.get_base_model()
    hidden = inner.model(**packed.inputs, use_cache=False).last_hidden_state
    return inner.lm_head(hidden[0, packed.at])


def training_examples(tokenizer, name: str, seed: int):
    """Yield examples of the split `train` without end, in the recipe's mix."""
    rng = random.Random(f"{name}-{seed}")
    while True:
        difficulty = rng.choices(words.DIFFICULTIES, RECIPES[name].mix)[0]
        problem = words.draw(difficulty, rng)
        if words.split(problem.question) == "train":
            yield encode(tokenizer, problem, name)


@torch.no_grad()
def validate(model, tokenizer, pattern: str, each: int) -> dict[int, float]:
    """Return by difficulty the share of `each` problems whose response is right.

    Every token must be the most likely one after those before it: just as greedy
    decoding would have it.
    """
    found = {}
    for difficulty in words.DIFFICULTIES:
        mix = [float(d == difficulty) for d in words.DIFFICULTIES]
        drawn = words.problems(each, "validation", 0, mix)
        packed = pack([encode(tokenizer, problem, pattern) for problem in drawn])
        right = predict(model, packed).argmax(-1) == packed.target
        whole = [part.all().item() for part in right.split(packed.lengths)]
        found[difficulty] = sum(whole) / each
    return found


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the rate of a step: ten of warm-up, then a cosine towards 2 %."""
    cosine = math.cos(math.pi / 2 * step / recipe.decay)
    return recipe.learning_rate * min(1, (step + 1) / 10) * max(0.02, cosine)


def train(model, tokenizer, name: str, seed: int, out: Path, every: int) -> None:
    """Train the adapters of `model`; save them, and what was measured, into `out`."""
    recipe = RECIPES[name]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    examples = training_examples(tokenizer, name, seed)
    tokens, losses = 0, []
    for step in range(recipe.steps):
        packed = pack([next(examples) for _ in range(recipe.batch)])
        optimiser.param_groups[0]["lr"] = learning_rate(recipe, step)
        logits = predict(model, packed)
        loss = torch.nn.functional.cross_entropy(logits, packed.target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        tokens += packed.inputs["input_ids"].shape[1]
        losses.append(loss.item())
        if (step + 1) % 10 == 0:
            recent = sum(losses[-10:]) / 10
            seconds = time.process_time()
            print(f"{step + 1}: loss {recent:.4f}, {seconds:.0f} CPU s", flush=True)
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            right = validate(model, tokenizer, name, each=16)
            print(f"right by steps: {right}", flush=True)
            save(model, out)
    summary = {
        "examples": recipe.steps * recipe.batch,
        "tokens": tokens,
        "cpu_seconds": round(time.process_time()),
        "right_by_steps": validate(model, tokenizer, name, each=64),
    }
    print(json.dumps(summary))


def save(model, out: Path) -> None:
    """Write the adapter in bfloat16."""
    state = {
        name: value.to(torch.bfloat16)
        for name, value in model.state_dict().items()
        if "lora_" in name
    }
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(out, state_dict=state)
    (out / "README.md").unlink(missing_ok=True)  # peft's model card, empty


def adapted(model, adapter: Path | None):
    """Return `model` with an adapter to train: a new one, or that of a folder."""
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return model
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--base", type=Path, default=HERE / "base")
    parser.add_argument("--out", type=Path, help="folder; default: as committed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=50, help="steps until it saves")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    out = args.out or HERE / f"{args.name}-lora"
    origin = RECIPES[args.name].starts_from
    model = adapted(model, HERE / f"{origin}-lora" if origin else None)
    train(model, tokenizer, args.name, args.seed, out, args.every)


if __name__ == "__main__":
    main()
