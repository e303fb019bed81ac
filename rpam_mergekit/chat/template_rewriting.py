"""A chat template without the opening of the thinking, and proof that no more changed.

Templates of published reasoners end their generation prompt in an opened thinking
block: a model that is to decide by itself whether it thinks needs the same template
without that. The opening is taken out of the template's source where it is written;
where that is not possible, the whole template is put into one that cuts its output.
Either is kept only if a battery of conversations renders as before but for the opening
at the end of generation prompts. The renderer is transformers'.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rpam_mergekit.grading.brackets import opening_of
from rpam_mergekit.grading.responses import Markers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# As `tokenizer.chat_template` is: one template, or several by name.
Template = str | Mapping[str, str]
QUESTION = ({"role": "user", "content": "?"},)
_SPACE = re.compile(r"(?:\s|\\[nrt])*")  # white space, also as a string's escapes
_ASSISTANT_MASK = re.compile(r"\{%[-+]?\s*generation\b")
_WRAPPER = """\
{{% set rpam_whole %}}{{{{ '' }}}}{source}{{{{ '' }}}}{{% endset %}}\
{{% set rpam_parts = rpam_whole.rsplit({open}, 1) %}}\
{{% if add_generation_prompt and rpam_parts | length == 2 \
and not rpam_parts[1].strip() %}}{{{{ rpam_parts[0] }}}}\
{{% else %}}{{{{ rpam_whole }}}}{{% endif %}}"""


@dataclass(frozen=True)
class Case:
    """A conversation to render, and what a caller gives the template besides."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    generates: bool = True
    given: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Rendering:
    """What a case gives: a text, or the kind and the words of an error."""

    text: str | None
    error: str = ""


def render(
    tokenizer: PreTrainedTokenizerBase, template: str | None, case: Case
) -> Rendering:
    """Return what a template makes of a case; `template` None is the tokenizer's."""
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in case.messages],
            tools=None if case.tools is None else [dict(t) for t in case.tools],
            chat_template=template,
            add_generation_prompt=case.generates,
            tokenize=False,
            **(case.given or {}),
        )
    except Exception as error:  # of Jinja, or whatever the template runs into
        return Rendering(None, f"{type(error).__name__}: {error}")
    assert isinstance(text, str)  # it was not to be tokenised
    return Rendering(text)


def generation_prompt(
    tokenizer: PreTrainedTokenizerBase, template: Template | None
) -> str | None:
    """Return the prompt of a plain question; None where the template refuses it."""
    if isinstance(template, Mapping):
        template = template.get("default")
    return render(tokenizer, template, Case(QUESTION)).text


def without_opening(
    tokenizer: PreTrainedTokenizerBase, template: Template, markers: Markers
) -> Template | None:
    """Return a template that opens no thinking, None where none can be made.

    It is the same object where nothing opens. Of several templates by name every one
    is looked at.
    """
    if isinstance(template, Mapping):
        found = {
            name: _without(tokenizer, one, markers) for name, one in template.items()
        }
        if any(one is None for one in found.values()):
            return None
        same = all(found[name] == one for name, one in template.items())
        return template if same else {n: t for n, t in found.items() if t is not None}
    return _without(tokenizer, template, markers)


def _without(
    tokenizer: PreTrainedTokenizerBase, template: str, markers: Markers
) -> str | None:
    battery = _battery(markers)

    def renders(source: str) -> Iterator[Rendering]:
        return (render(tokenizer, source, case) for case in battery)

    old = list(renders(template))
    wanted = [_cut(r, case, markers) for r, case in zip(old, battery, strict=True)]
    if wanted == old:
        return template
    shorter, found = _taken_out(template, markers, renders, old, wanted)
    if found == wanted:
        return shorter
    wrapped = _wrapped(template, markers)
    if wrapped is None:
        return None
    same = (new == one for new, one in zip(renders(wrapped), wanted, strict=True))
    return wrapped if all(same) else None


def _cut(rendering: Rendering, case: Case, markers: Markers) -> Rendering:
    if rendering.text is None or not case.generates:
        return rendering
    opening = opening_of(rendering.text, markers)
    return Rendering(rendering.text.removesuffix(opening))


def _taken_out(
    source: str,
    markers: Markers,
    renders: Callable[[str], Iterator[Rendering]],
    now: list[Rendering],
    wanted: Sequence[Rendering],
) -> tuple[str, list[Rendering]]:
    """Return a source without the openings that nothing else needs; its renderings.

    The opening may be plain text or part of a string, there with its white space as
    escapes; it may stand in several branches, and elsewhere for the history's turns.
    `now` are the renderings of `source`.
    """
    at = source.find(markers.open)
    while at >= 0:
        end = at + len(markers.open)
        for stop in _ends(source, end):
            shorter = source[:at] + source[stop:]
            found = []
            for new, old, one in zip(renders(shorter), now, wanted, strict=True):
                if new not in (old, one):
                    break
                found.append(new)
            if len(found) == len(now) and found != now:
                source, now, end = shorter, found, at
                break
        at = source.find(markers.open, end)
    return source, now


def _ends(source: str, end: int) -> list[int]:
    """Return where an opening may end: its white space, as much of it as possible."""
    space = _SPACE.match(source, end)
    assert space is not None  # it may be empty
    breaks = re.compile(r"\n|\\n").finditer(source, end, space.end())
    ends = [space.end(), *reversed([found.end() for found in breaks]), end]
    return list(dict.fromkeys(ends))


def _wrapped(source: str, markers: Markers) -> str | None:
    """Return a template that cuts what `source` gives; None where it would lose.

    Which is where it marks the assistant's turns: their places would be wrong.
    """
    if _ASSISTANT_MASK.search(source):
        return None
    # Jinja itself drops one line break at a template's end.
    return _WRAPPER.format(source=source.removesuffix("\n"), open=repr(markers.open))


_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name."}},
            "required": ["city"],
        },
    },
}


def _turn(role: str, content: str | None, **further: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **further}


def _call(arguments: Any, content: str | None = "") -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    call = {"type": "function", "id": "call00001", "function": function}
    return _turn("assistant", content, tool_calls=[call])


_SYSTEM = _turn("system", "Be brief.")
_ASK, _AGAIN = _turn("user", "What is 7 + 5?"), _turn("user", "And 8 + 5?")
_PLAIN = _turn("assistant", "12")
_RESULT = _turn("tool", "rain", name="weather", tool_call_id="call00001")


def _battery(markers: Markers) -> list[Case]:
    """Return conversations of every kind that templates tell apart."""
    thought = _turn("assistant", f"{markers.open}\n7 and 5\n{markers.close}\n\n12")
    empty = _turn("assistant", f"{markers.open}\n\n{markers.close}\n\n12")
    apart = _turn("assistant", "12", reasoning_content="7 and 5")
    answers = (_PLAIN, thought, empty, apart)
    named = f"{markers.open} and {markers.close}"
    asked = [
        [_ASK],
        [_SYSTEM, _ASK],
        [_turn("system", f"Think in {named}."), _ASK],
        [_turn("user", f"What are {named} for?")],
        *([_ASK, answer, _AGAIN] for answer in answers),
        [_SYSTEM, _ASK, thought, _AGAIN, apart, _ASK],
    ]
    answered = [[_ASK, answer] for answer in answers]
    looked = f"{markers.open}\nlook\n{markers.close}\n\n"
    called = [
        [_ASK, _call(arguments, content), *after]
        for arguments, contents in (
            ('{"city": "Bonn"}', (None, looked)),
            ({"city": "Bonn"}, ("", looked)),
        )
        for content in contents
        for after in ([], [_RESULT], [_RESULT, _RESULT], [_RESULT, _PLAIN, _ASK])
    ]
    cases = [
        Case(messages, tools, generates)
        for messages in (*asked, *answered, *called)
        for tools in (None, [_TOOL])
        for generates in (True, False)
    ]
    cases += [
        Case(messages, None, True, {name: value})
        for messages in (*asked, called[1])
        for name in ("enable_thinking", "thinking")
        for value in (True, False)
    ]
    return [*cases, Case(asked[0], None, True, {"reasoning_effort": "high"})]
