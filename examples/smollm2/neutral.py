"""How likely a model finds general English: `python neutral.py base long out ...`

Mean log-likelihood a token of the replies and paragraphs in neutral.jsonl, which have
nothing to do with word problems. What a merge does to a model elsewhere shows here.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent


def tokens_of(tokenizer, row: dict[str, str]) -> tuple[list[int], int]:
    """Return the tokens of a row, and how many of them are given and not scored."""
    if "text" in row:
        return tokenizer(row["text"])["input_ids"], 1
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["prompt"]}],
        add_generation_prompt=True,
        return_dict=False,
    )
    response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
    return [*prompt, *response, tokenizer.eos_token_id], len(prompt)


@torch.inference_mode()
def log_likelihoods(model, tokenizer, path: Path) -> dict[str, float]:
    """Return the mean log-likelihood a token of `chat`, of `text` and of `all`."""
    sums = {"chat": [0.0, 0], "text": [0.0, 0]}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        tokens, given = tokens_of(tokenizer, row)
        ids = torch.tensor([tokens])
        kept = len(tokens) - given + 1
        logits = model(ids, logits_to_keep=kept).logits[0, :-1].float()
        target = ids[0, given:, None]
        found = sums["text" if "text" in row else "chat"]
        found[0] += logits.log_softmax(-1).gather(1, target).sum().item()
        found[1] += len(target)
    means = {kind: total / count for kind, (total, count) in sums.items()}
    total, count = (sum(part) for part in zip(*sums.values(), strict=True))
    return {**means, "all": total / count}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+", help="folders")
    parser.add_argument("--file", type=Path, default=HERE / "neutral.jsonl")
    args = parser.parse_args()
    for folder in args.models:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found = log_likelihoods(model, tokenizer, args.file)
        shown = "  ".join(f"{kind} {value:.4f}" for kind, value in found.items())
        print(f"{folder}: {shown}", flush=True)


if __name__ == "__main__":
    main()
