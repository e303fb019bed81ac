"""The chat template of a merge: which one queries get, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from rpam_mergekit.chat.template_rewriting import Template, without_opening
from rpam_mergekit.chat.thinking import LONG, ThinkingMode, opens, thinking_of
from rpam_mergekit.formats.calibration import CalibrationQuery
from rpam_mergekit.models.patches import set_chat_template
from rpam_mergekit.settings import NO_BRACKETS, RpamSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenizers = Mapping[ModelReference, "PreTrainedTokenizerBase"]


def template_findings(config: MergeConfiguration, tokenizers: Tokenizers) -> list[str]:
    """Return what is wrong with `chat_template`, which mergekit says late or never.

    `tokenizers` are those of the models that have one.
    """
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
        set_chat_template(SimpleNamespace(), config)
    except RuntimeError:
        return [
            f"chat_template: found '{config.chat_template}', which is neither the name "
            "of a template that mergekit has, such as chatml, nor Jinja of at least 20 "
            "characters."
        ]
    return []


def template_in_use(
    config: MergeConfiguration, tokenizers: Tokenizers, base: ModelReference
) -> Template | None:
    """Return the chat template of the output and of the calibration prompts.

    The config's `chat_template`, as mergekit resolves it, or that of the base.
    """
    own: Template | None = None
    if base in tokenizers:
        own = tokenizers[base].chat_template
    if config.chat_template == "auto":
        templates = Counter(
            one.strip() for one in map(_default, tokenizers.values()) if one
        )
        return templates.most_common(1)[0][0] if templates else own
    found = SimpleNamespace(chat_template=own)
    with suppress(RuntimeError):  # which `template_findings` says
        set_chat_template(found, config)
    template: Template | None = found.chat_template
    return template


def _default(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template: Template | None = tokenizer.chat_template
    return template.get("default") if isinstance(template, Mapping) else template


@dataclass(frozen=True)
class TemplateInUse:
    """The chat template of a merge, and who opens the thinking.

    name: how messages call it. template: None where there is none. thinking: see
    there. without: the template without the opening, where that is taken out.
    """

    name: str = ""
    tokenizer: PreTrainedTokenizerBase | None = None
    template: Template | None = None
    thinking: ThinkingMode = field(default_factory=ThinkingMode)
    without: Template | None = None

    @classmethod
    def of(
        cls,
        config: MergeConfiguration,
        tokenizers: Tokenizers,
        base: ModelReference,
        queries: Sequence[CalibrationQuery],
        settings: RpamSettings,
    ) -> TemplateInUse:
        """Return that of a config; raise nothing: see `findings`."""
        tokenizer = tokenizers.get(base)
        template = template_in_use(config, tokenizers, base)
        own = [one.chat_template for one in tokenizers.values()]
        thinking = thinking_of(tokenizer, template, queries, settings, own)
        without = None
        markers = thinking.markers if thinking.takes_out else None
        if tokenizer is not None and template is not None and markers is not None:
            without = without_opening(tokenizer, template, markers)
        of_config = config.chat_template is not None
        name = "chat_template" if of_config else f"the chat template of {base}"
        return cls(name, tokenizer, template, thinking, without)

    def named_in(self, config: MergeConfiguration) -> MergeConfiguration:
        """Return a config that names the output's template, where that is rewritten.

        So that a merge by it needs no rewriting; of several templates the default.
        """
        named = self.without
        if isinstance(named, Mapping):
            named = named.get("default")
        return config.model_copy(update={"chat_template": named}) if named else config

    def findings(
        self, queries: Sequence[CalibrationQuery], settings: RpamSettings
    ) -> list[str]:
        """Return what keeps the merge from doing as `thinking` says."""
        found = []
        if self.thinking.takes_out and self.without is None:
            found.append(
                f"{self.name} ends prompts with {self.thinking.opening!r}, and no "
                "template can be made of it that renders the same but for that. Name "
                "one that does not open the thinking in chat_template:, or keep it "
                "with parameters.thinking: template, by which every response thinks."
            )
        stripped = self._stripped(queries, settings)
        if stripped and self._in_brackets(settings):
            found.append(
                f"parameters.calibration: {stripped}, though its model thinks in "
                f"{self._brackets}: the thinking was taken out, as lm-eval and servers "
                "with a reasoning parser do, and Long would be aligned to answer at "
                "once. Sample again with the thinking in the responses, use "
                "parameters.tokens: prompt, or say with think_open and think_close how "
                f"Long's thinking is marked ({NO_BRACKETS}: not at all)."
            )
        return found

    def notes(
        self,
        queries: Sequence[CalibrationQuery],
        settings: RpamSettings,
        others: Tokenizers,
    ) -> list[str]:
        """Return what a user should know of the template. `others` are not the base."""
        if not self.template:
            having = [str(m) for m, its in others.items() if its.chat_template]
            if not having or self.tokenizer is None:
                return []  # encode_calibration says that there is none
            return [
                f"{self.name.removeprefix('the chat template of ')} has no chat "
                f"template, {', '.join(having)} has one; a template can be set in "
                "chat_template"
            ]
        notes = self._opening_notes(queries)
        stripped = self._stripped(queries, settings)
        if stripped and settings.think_open is None and not self._in_brackets(settings):
            notes.append(
                f"{stripped}; if its model thinks in brackets, name them in think_open "
                "and think_close"
            )
        return notes

    def _opening_notes(self, queries: Sequence[CalibrationQuery]) -> list[str]:
        thinking, opening = self.thinking, self.thinking.opening
        if thinking.takes_out:
            return [
                f"{self.name} opens the thinking: it ends prompts with {opening!r}. "
                "The merged model is to decide, so that this is taken out of the "
                "output's chat template (thinking: model)"
            ]
        if not opening:
            known = opens(self.tokenizer, self.template)
            return [
                f"{self.name} ends prompts with {known!r}, which think_open does not "
                "name: it stays there"
            ] * bool(known)
        notes = [
            f"{self.name} opens the thinking: it ends prompts with {opening!r}, and "
            "thinking: template keeps that. The merged model cannot answer at once: "
            "every prompt has opened its thinking"
        ]
        assert thinking.markers is not None
        again = sum(
            (query.response or "").lstrip().startswith(thinking.markers.open)
            for query in queries
        )
        if again:
            notes.append(
                f"{again} responses of the calibration file begin with the opening, "
                "which their prompts have already: it is taken out of the responses"
            )
        return notes

    def _stripped(
        self, queries: Sequence[CalibrationQuery], settings: RpamSettings
    ) -> str:
        """Return that no response of Long thinks, '' where one does or none counts."""
        responses = [q.response for q in queries if q.pattern == LONG and q.response]
        counts = settings.tokens == "prompt+response" and self.thinking.markers
        if not counts or not responses or any(map(self.thinking.thinks, responses)):
            return ""
        return (
            f"no response of the pattern '{LONG}' thinks ({len(responses)} were read)"
        )

    def _in_brackets(self, settings: RpamSettings) -> bool:
        """Tell whether there are signs that the base thinks in brackets."""
        markers = self.thinking.markers
        if markers is None:
            return False
        pair = (markers.open, markers.close)
        vocabulary = self.tokenizer.get_vocab() if self.tokenizer is not None else {}
        return (
            settings.think_open is not None
            or bool(self.thinking.opening)
            or any(one in vocabulary or one in str(self.template) for one in pair)
        )

    @property
    def _brackets(self) -> str:
        markers = self.thinking.markers
        return f"{markers.open} and {markers.close}" if markers else NO_BRACKETS
