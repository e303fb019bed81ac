"""What a model's chat template makes of the queries: markers, opening, end tokens.

The template is asked where it can be: of a model in this process its own, of one that a
server generates from that of MODEL, in a folder or on the Hub, or that of --tokenizer.
What it says is believed of a model in this process; of one on a server, which may have
been started with another template, --opened-by-prompt has the last word.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpam_mergekit.errors import RpamError, first_line
from rpam_mergekit.grading.brackets import KNOWN, markers_in, opening_of, usual_opening
from rpam_mergekit.grading.messages import (
    DIRECT,
    ECHO,
    JOINED,
    REPEATS,
    UNANSWERED,
    repeats,
    turn_of,
    without_prompt,
)
from rpam_mergekit.grading.responses import Markers, without_end
from rpam_mergekit.questions.load import Question
from rpam_mergekit.sampling.request import ThinkingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WHOLE = (
    "To get whole texts, start the server without a reasoning parser, or ask for them: "
    "--extra-body '{\"separate_reasoning\": false}' of SGLang, "
    '\'{"reasoning_format": "none"}\' of llama.cpp.'
)
# What was done to so many responses.
_DONE = {
    JOINED: "the server splits off the reasoning (a reasoning parser): in {n} "
    "responses it was put back between the thinking markers, its exact spacing is "
    f"lost. {_WHOLE}",
    DIRECT: "{n} responses came as reasoning without content, though they ended: they "
    "are taken for answers given at once (after a prompt that opened the thinking, "
    "only short ones). Many reasoning parsers take an answer without '{close}' for "
    f"thinking (vllm-project/vllm#13125). {_WHOLE}",
    UNANSWERED: "{n} responses came as reasoning without content: they are taken for "
    f"thinking without an answer. {_WHOLE}",
    ECHO: "{n} responses begin with the prompt itself: it was cut off. The server "
    "returns prompts with what it generates.",
    REPEATS: "{n} responses repeat their prompt and are kept as they are: the server "
    "returns prompts with what it generates, or the model goes on as the user, past "
    "the end of its turn.",
}
_NO_SYSTEM = (
    "Leave --system out, or put its text after the questions with --instruction."
)


@dataclass(frozen=True)
class Turns:
    """What is known of the turns in which a model answers.

    opening: the text by which its prompts open the thinking, None if it is not known;
    ends: its end tokens; notes: what the user should know; tokenizer: its own, if it is
    known, and rendering: the further variables of its template.
    """

    markers: Markers
    opening: str | None
    ends: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None
    rendering: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """Return the prompt of a query, None if it is not known."""
        if self.tokenizer is None:
            return None
        from rpam_mergekit.chat.rendering import prompt_text

        try:
            return prompt_text(messages, self.tokenizer, **self.rendering)
        except Exception:  # whatever a template raises; the server may have another
            return None

    def count(self, text: str) -> int:
        """Return how many tokens a text has; only where the tokenizer is known."""
        assert self.tokenizer is not None
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class MessageReader:
    """Makes whole turns of a server's messages, and remembers what it did to them."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._done: Counter[str] = Counter()

    def read(
        self,
        message: Mapping[str, Any],
        finish: str,
        tokens: int | None,
        messages: Sequence[Mapping[str, str]],
    ) -> str:
        """Return a response as one text that is valid Unicode, without its end token.

        `messages` are the query, `tokens` how many the server says it generated.
        """
        turns, prompt = self._turns, self._turns.prompt(messages)
        if prompt and prompt.strip() == messages[-1]["content"].strip():
            prompt = None  # an answer may begin with the question
        count = turns.count if turns.tokenizer is not None else None
        fields = {k: self._clean(v, prompt) for k, v in message.items()}
        text, done = turn_of(
            fields, turns.markers, turns.opening, finish, tokens, count
        )
        self._done.update([done, REPEATS if repeats(text, messages) else ""])
        text = text.encode("utf-8", "replace").decode("utf-8")
        return without_end(text, turns.markers, turns.ends)

    def _clean(self, value: Any, prompt: str | None) -> Any:
        """Return a field without an end token, which parsers leave behind either part.

        And without the prompt before it.
        """
        if not isinstance(value, str):
            return value
        left = without_prompt(value, prompt)
        self._done[ECHO] += left != value
        return without_end(left, self._turns.markers, self._turns.ends)

    def notes(self) -> Iterator[str]:
        """Yield what the user should know of what was done."""
        for kind, text in _DONE.items():
            if self._done[kind]:
                text = text.replace("{n}", str(self._done[kind]))
                yield text.replace("{close}", self._turns.markers.close)


def thinking_header(markers: Markers, opening: str | None) -> dict[str, Any]:
    """Return the entry `thinking` of a sample file's header.

    `opening` says that the responses are whole turns; files without it are older.
    """
    return {
        "open": markers.open,
        "close": markers.close,
        "opening": opening,
        "opened_by_prompt": None if opening is None else bool(opening),
    }


def check_questions(
    model: str,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    system: str | None,
) -> None:
    """Raise `RpamError` if the chat template does not take a query as it is."""
    # Not at the top: it needs torch, which the commands on files do not.
    from rpam_mergekit.chat.rendering import prompt_text, template_problem

    for question in questions:
        problem = template_problem(question.messages, tokenizer)
        if problem is not None:
            which = f"query {question.index}"
            remedy = "Leave such queries out, or mend the template."
            if system and not template_problem(question.messages[1:], tokenizer):
                which, remedy = "--system", _NO_SYSTEM
            named = problem.replace("template", f"template of {model}", 1)
            raise RpamError(f"{which}: {named.rstrip('.')}. {remedy}")
    if system and questions:
        first, *turns = questions[0].messages
        other = {**first, "content": f"{first['content']} 0?"}
        if prompt_text([first, *turns], tokenizer) == prompt_text(
            [other, *turns], tokenizer
        ):
            raise RpamError(
                f"--system: the chat template of {model} leaves system messages out: "
                f"the model would never read it. {_NO_SYSTEM}"
            )


def turns_here(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    options: ThinkingOptions,
) -> Turns:
    """Return the turns of a model in this process, of which `tokenizer` tells all."""
    found = _told(tokenizer, messages, options, {})
    said = options.opened_by_prompt
    if said is None or said == bool(found.opening):
        return found
    opens = f"opens it, with {found.opening!r}" if found.opening else "does not open it"
    note = (
        f"{_flag(said)} is not heeded: the chat template of {model} {opens}, and is "
        "what makes the prompts"
    )
    return replace(found, notes=(*found.notes, note))


def turns_served(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    messages: Sequence[Mapping[str, str]],
    options: ThinkingOptions,
    extra_body: Mapping[str, Any],
) -> Turns:
    """Return the turns of a model that a server generates from.

    `names` are those that the server and the user have for it; `tokenizer` is that of
    --tokenizer, if there is one.
    """
    said = options.opened_by_prompt
    reasons: list[str] = []
    if tokenizer is None:
        tokenizer = _looked_up(names, reasons)
    found = None
    if tokenizer is not None:
        try:
            found = _told(tokenizer, messages, options, extra_body)
        except Exception as error:  # whatever a template raises, also on no system turn
            reasons.append(f"it refuses the queries: {first_line(error)}")
    if found is None:
        return _not_told(names[0], reasons, options)
    if said is None or said == bool(found.opening):
        return found
    note = (
        f"{_flag(said)} is believed, although the chat template of {names[0]} "
        f"{'opens' if found.opening else 'does not open'} the thinking"
    )
    opening = usual_opening(found.markers) if said else ""
    return replace(found, opening=opening, notes=(*found.notes, note))


def continued(
    turns: Turns, header: Mapping[str, Any], options: ThinkingOptions
) -> Turns:
    """Return the turns of a run that goes on with the file of this header.

    What could not be asked, then or now, is as the file has it.
    """
    known = header.get("thinking", {})
    if "opening" not in known or options.opened_by_prompt is not None:
        return turns
    if turns.opening is not None and known["opening"] is not None:
        return turns
    kept = Markers(known["open"], known["close"])
    named = [options.think_open or kept.open, options.think_close or kept.close]
    return replace(turns, markers=Markers(*named), opening=known["opening"], notes=())


def markers_of(
    options: ThinkingOptions, known: Mapping[str, Any] | None = None
) -> Markers:
    """Return the markers that the options name, else those of a header, else ours.

    Where only the opening one is named, its usual counterpart closes.
    """
    known = dict(known or {})
    pairs = {markers.open: markers.close for markers in KNOWN}
    if options.think_open in pairs:
        known["close"] = pairs[options.think_open]
    chosen = []
    for name, value, usual in (
        ("open", options.think_open, Markers.open),
        ("close", options.think_close, Markers.close),
    ):
        if value is None:
            value = known.get(name, usual)
        if not value:
            raise RpamError(f"--think-{name}: a marker cannot be empty.")
        chosen.append(value)
    return Markers(*chosen)


def _told(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    options: ThinkingOptions,
    extra_body: Mapping[str, Any],
) -> Turns:
    """Return what a tokenizer and its chat template say.

    vLLM and SGLang render it as a request's fields want it.
    """
    from rpam_mergekit.chat.rendering import prompt_text

    rendering = dict(extra_body.get("chat_template_kwargs") or {})
    if "chat_template" in extra_body:
        rendering["chat_template"] = extra_body["chat_template"]
    prompt = prompt_text(messages, tokenizer, **rendering)
    markers = markers_of(options, _recognised(tokenizer, prompt))
    opening, ends = opening_of(prompt, markers), end_tokens(tokenizer)
    return Turns(markers, opening, ends, tokenizer=tokenizer, rendering=rendering)


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the texts of a model's end tokens, by tokenizer and generation config."""
    ids: list[Any] = [tokenizer.eos_token_id]
    for config in _configs(tokenizer.name_or_path):
        ends = config.get("eos_token_id")
        ids += ends if isinstance(ends, list) else [ends]
    known = dict.fromkeys(number for number in ids if isinstance(number, int))
    texts = tokenizer.convert_ids_to_tokens(list(known))
    return tuple(text for text in texts if isinstance(text, str) and text)


def _configs(name: str) -> Iterator[dict[str, Any]]:
    """Yield a model's generation config and config, as far as they can be read."""
    from transformers import GenerationConfig, PretrainedConfig

    away = not Path(name).is_dir() and _hub_is_away()
    with contextlib.suppress(Exception):  # no such file, or none that can be read
        yield GenerationConfig.from_pretrained(name, local_files_only=away).to_dict()
    with contextlib.suppress(Exception):
        yield PretrainedConfig.get_config_dict(name, local_files_only=away)[0]


def _recognised(tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, str]:
    """Return the brackets in which a template writes thinking, as a header has them."""
    found = next((m for m in KNOWN if opening_of(prompt, m)), None)
    template = getattr(tokenizer, "chat_template", None)
    found = found or markers_in([template] if isinstance(template, str) else [])
    return {"open": found.open, "close": found.close} if found else {}


def _looked_up(
    names: Sequence[str], reasons: list[str]
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of the first name that has one, else None with reasons."""
    from transformers import AutoTokenizer

    for name in dict.fromkeys(names):
        local = Path(name).is_dir()
        if not local and name.count("/") != 1:
            reasons.append(f"'{name}' is no folder and no name of the Hub")
            continue
        try:
            return AutoTokenizer.from_pretrained(
                name,
                trust_remote_code=False,
                local_files_only=not local and _hub_is_away(),
            )
        except Exception as error:  # of transformers, huggingface_hub, or a parser
            reasons.append(f"{name}: {first_line(error)}")
    return None


def _hub_is_away() -> bool:
    """Tell whether only the cache can be asked; huggingface_hub would try for long."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    from rpam_mergekit.models.patches import unreachable

    return unreachable()


def _not_told(name: str, reasons: Sequence[str], options: ThinkingOptions) -> Turns:
    """Return what the options alone say, with a note on what is not known."""
    markers, said = markers_of(options), options.opened_by_prompt
    why = f"the chat template of {name} cannot be asked ({'; '.join(reasons)})"
    if said is not None:
        opening = usual_opening(markers) if said else ""
        note = f"{why}: {_flag(said)} is believed"
        return Turns(markers, opening, notes=(note,))
    note = (
        f"{why}: whether prompts open the thinking is not known, and only a response "
        "that closes it tells. Give --tokenizer the model's name or folder, or say "
        "--opened-by-prompt or --not-opened-by-prompt"
    )
    return Turns(markers, None, notes=(note,))


def _flag(said: bool) -> str:
    return "--opened-by-prompt" if said else "--not-opened-by-prompt"
