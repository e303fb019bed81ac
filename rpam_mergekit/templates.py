"""The chat template of a merge: which one queries get, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

OPENED = "<think>"
QUESTION = [{"role": "user", "content": "?"}]


def template_findings(
    config: MergeConfiguration, tokenizers: Mapping[ModelReference, Any]
) -> list[str]:
    """Return what is wrong with `chat_template`, which mergekit says late or never.

    `tokenizers` are those of the models that have one.
    """
    from mergekit.merge import _set_chat_template

    if config.chat_template == "auto":
        templates = Counter(str(t.chat_template or "") for t in tokenizers.values())
        del templates[""]
        first, *others = templates.most_common(2) or [("", 0)]
        if not others or others[0][1] < first[1]:
            return []
        return [
            "chat_template: found 'auto', by which mergekit takes the template of most "
            "models, but as many have another: it would be drawn by chance. Leave it "
            "out for that of base_model, or name one."
        ]
    try:
        _set_chat_template(SimpleNamespace(), config)
    except RuntimeError:
        return [
            f"chat_template: found '{config.chat_template}', which is neither the name "
            "of a template that mergekit has, such as chatml, nor Jinja of at least 20 "
            "characters."
        ]
    return []


def template_notes(
    tokenizers: Mapping[ModelReference, Any],
    responses: Collection[str],
    pattern: str = "short",
) -> list[str]:
    """Return notes on the base's chat template, which all queries get.

    `responses` are those of the calibration file; `pattern` is the other model's.
    """
    (base, mine), *others = tokenizers.items()
    if not mine.chat_template:
        having = [str(model) for model, its in others if its.chat_template]
        if not having:
            return []  # encode_calibration says that there is none
        return [
            f"{base} has no chat template, {', '.join(having)} has one; a template can "
            "be set in chat_template"
        ]
    try:
        prompt = mine.apply_chat_template(
            QUESTION, tokenize=False, add_generation_prompt=True
        )
    except Exception:
        return []  # encode_calibration says which query it refuses
    if not prompt.rstrip().endswith(OPENED):
        return []
    ending = prompt[prompt.rindex(OPENED) :]
    notes = [
        f"the chat template of {base} opens the thinking block by itself: prompts end "
        f"with {ending!r}, and the responses of '{pattern}' follow it, too"
    ]
    again = sum(response.lstrip().startswith(OPENED) for response in responses)
    if again:
        notes.append(
            f"{again} responses of the calibration file open it once more: they start "
            f"with '{OPENED}', which the prompt has already"
        )
    return notes
