"""Conversations as text and token ids, by a tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rpam_mergekit.chat.thinking import ThinkingMode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def template_problem(
    conversation: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """Return what the chat template does wrong with a conversation, or None.

    It may raise an error, or make the same prompt whatever the user says.
    """
    try:
        text = prompt_text(conversation, tokenizer)
        last = {**conversation[-1], "content": f"{conversation[-1]['content']} 0?"}
        other = prompt_text([*conversation[:-1], last], tokenizer)
    except Exception as error:
        return f"the chat template refuses this query: {error}"
    if text != other:
        return None
    role = conversation[-1]["role"]
    return (
        f"the chat template leaves the message of the role '{role}' out: the prompt is "
        f"{text[-60:]!r}, whatever it says"
    )


def prompt_text(
    conversation: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    **rendering: Any,
) -> str:
    """Return the prompt up to where the response begins, by the chat template.

    Plain text, turns apart by an empty line, where the tokenizer has no template.
    `rendering` are further variables of the template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return "\n\n".join(turn["content"] for turn in conversation)
    return _rendered(conversation, tokenizer, add_generation_prompt=True, **rendering)


def prompt_ids(
    conversation: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    thinking: ThinkingMode | None = None,
) -> list[int]:
    """Return the token ids of `prompt_text`, up to where `thinking` lets it go.

    A template writes its own special tokens; plain text gets the tokenizer's.
    """
    text = prompt_text(conversation, tokenizer)
    if thinking is not None:
        text = thinking.prompt(text)
    plain = getattr(tokenizer, "chat_template", None) is None
    return list(tokenizer(text, add_special_tokens=plain)["input_ids"])


def end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends an assistant turn, by the chat template.

    Chat models often end a turn with another token than the tokenizer's end token
    (Gemma's `<end_of_turn>`, Phi-3's `<|end|>`). The tokenizer's own, where it has no
    template or the template writes no special token behind the turn.
    """
    usual: int | None = tokenizer.eos_token_id
    if getattr(tokenizer, "chat_template", None) is None:
        return usual
    said = "42 is what was said"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    try:
        text = _rendered(turns, tokenizer)
    except Exception:  # templates raise what they like
        return usual
    _, found, behind = text.rpartition(said)
    ending = [
        (len(token.content), number)
        for number, token in tokenizer.added_tokens_decoder.items()
        if found and token.special and behind.lstrip().startswith(token.content)
    ]
    return max(ending)[1] if ending else usual


def _rendered(
    conversation: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    **rendering: Any,
) -> str:
    """Return what the chat template makes of a conversation."""
    text = tokenizer.apply_chat_template(
        [dict(turn) for turn in conversation], tokenize=False, **rendering
    )
    assert isinstance(text, str)  # it was not to be tokenised
    return text
