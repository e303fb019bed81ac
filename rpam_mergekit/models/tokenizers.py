"""Do the models' token ids mean the same: tokenizers, special tokens, chat templates.

rpam merges embeddings and heads by token id, and the merged model gets the tokenizer,
chat template and generation config of the base. Models of which many ids stand for
other tokens are no fine-tunings of one base; special tokens are often renamed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from rpam_mergekit.errors import RpamError, first_line
from rpam_mergekit.text import listed

# Of the ids that both have: where more ordinary ones differ, the models do not fit.
MOST_DIFFERING = 0.01
NAMED = 3


def load_tokenizer(
    model: ModelReference, options: MergeOptions
) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer. Raises `RpamError` if it cannot be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.model.path,
            revision=model.model.revision,
            trust_remote_code=options.trust_remote_code,
        )
    except Exception as error:
        raise RpamError(
            f"{model}: its tokenizer cannot be loaded: {first_line(error)}"
        ) from error
    # Which is what transformers makes of no file at all.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise RpamError(
            f"{model}: its tokenizer cannot be loaded: there is no vocabulary file, "
            "such as tokenizer.json."
        )
    return tokenizer


@dataclass(frozen=True)
class Differences:
    """What two tokenizers, the base's first, make of the same ids."""

    shared: int
    ordinary: Sequence[int]
    special: Sequence[int]
    only_first: Sequence[int]
    only_second: Sequence[int]
    tokens: tuple[Mapping[int, str], Mapping[int, str]]

    @classmethod
    def of(
        cls, first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase
    ) -> Differences:
        """Compare two tokenizers; special ids are those that either has added."""
        one, two = (
            {i: token for token, i in tokenizer.get_vocab().items()}
            for tokenizer in (first, second)
        )
        added = {*first.added_tokens_decoder, *second.added_tokens_decoder}
        shared = one.keys() & two.keys()
        differing = sorted(i for i in shared if one[i] != two[i])
        return cls(
            len(shared),
            [i for i in differing if i not in added],
            [i for i in differing if i in added],
            sorted(one.keys() - shared),
            sorted(two.keys() - shared),
            (one, two),
        )

    @property
    def same(self) -> bool:
        """Whether both have the same tokens at the same ids."""
        one, two = self.tokens
        return one == two

    def named(self, ids: Sequence[int]) -> str:
        """Return the first of `ids` with the tokens that both have there."""
        one, two = self.tokens
        shown = [
            f"{i} ({' / '.join(repr(t[i]) for t in (one, two) if i in t)})" for i in ids
        ]
        return listed(shown, NAMED)


def compare_tokenizers(
    base: ModelReference,
    mine: PreTrainedTokenizerBase,
    other: ModelReference,
    its: PreTrainedTokenizerBase,
) -> tuple[list[str], list[str]]:
    """Return findings and notes on two tokenizers."""
    found = Differences.of(mine, its)
    if len(found.ordinary) > MOST_DIFFERING * found.shared:
        share = 100 * len(found.ordinary) / found.shared
        return [
            f"the tokenizers differ: {len(found.ordinary)} of {found.shared} token ids "
            f"({share:.0f} %) stand for other tokens in {base} than in {other}: "
            f"{found.named(found.ordinary)}. Vocabularies are merged by token id: the "
            "models must be fine-tunings of one base."
        ], []
    notes = []
    if found.ordinary:
        notes.append(
            f"{len(found.ordinary)} ordinary token ids stand for other tokens in "
            f"{base} than in {other}: {found.named(found.ordinary)}. Vocabularies are "
            "merged by token id; make sure that the models have one base"
        )
    if found.special:
        notes.append(
            f"{len(found.special)} special tokens have other names in {base} than in "
            f"{other}, at the same ids: {found.named(found.special)}; the merged model "
            "has the base's names"
        )
    for model, ids in ((base, found.only_first), (other, found.only_second)):
        if ids:
            notes.append(
                f"{len(ids)} tokens are in the tokenizer of {model} only: "
                f"{found.named(ids)}; the merged model has the base's tokenizer"
            )
    return [], notes


def tokenizer_findings(
    config: MergeConfiguration,
    tokenizers: Mapping[ModelReference, PreTrainedTokenizerBase],
    configs: Mapping[ModelReference, PretrainedConfig],
) -> list[str]:
    """Return what keeps mergekit's `tokenizer` from meaning what a merge by id does.

    Its alignment is by token. It is the same where all tokenizers are: then rows are
    cut that no token has, or padding is added. `tokenizers`: the base's first.
    """
    key, source = "tokenizer_source", config.tokenizer_source
    if config.tokenizer is not None:
        key, source = "tokenizer.source", config.tokenizer.source
    if source is None:
        return []
    leave_out = "Leave it out: the output gets the tokenizer of base_model."
    findings = []
    if isinstance(source, ModelReference) and source != config.base_model:
        findings.append(
            f"{key}: found {source}. The calibration queries are encoded with the "
            f"tokenizer and chat template of base_model; use 'base'. {leave_out}"
        )
    if config.tokenizer is not None and config.tokenizer.tokens:
        findings.append(
            f"tokenizer.tokens: found {', '.join(config.tokenizer.tokens)}. rpam "
            "merges every token's embedding; it has no sources for single tokens."
        )
    if tokenizers:
        rows = configs[next(iter(tokenizers))].get_text_config().vocab_size
        findings += _not_aligned(key, tokenizers, rows, leave_out)
    return findings


def row_notes(
    config: MergeConfiguration,
    tokenizers: Mapping[ModelReference, PreTrainedTokenizerBase],
    configs: Mapping[ModelReference, PretrainedConfig],
) -> list[str]:
    """Return a note if `tokenizer` gives the embeddings other rows than the base's.

    `tokenizers`: the base's first.
    """
    named = config.tokenizer is not None or config.tokenizer_source is not None
    if not named or not tokenizers:
        return []
    base, tokenizer = next(iter(tokenizers.items()))
    rows, kept = configs[base].get_text_config().vocab_size, len(tokenizer.get_vocab())
    multiple = (config.tokenizer and config.tokenizer.pad_to_multiple_of) or 1
    kept = -(-kept // multiple) * multiple
    if kept == rows:
        return []
    return [
        f"tokenizer: embeddings and head get {kept} rows instead of the {rows} of "
        f"{base}: mergekit keeps those of the tokenizer's {len(tokenizer.get_vocab())} "
        "tokens. Without tokenizer and tokenizer_source all rows stay"
    ]


def _not_aligned(
    key: str,
    tokenizers: Mapping[ModelReference, PreTrainedTokenizerBase],
    rows: int,
    leave_out: str,
) -> list[str]:
    (base, mine), *others = tokenizers.items()
    findings = []
    for other, its in others:
        found = Differences.of(mine, its)
        if not found.same:
            ids = [*found.ordinary, *found.special]
            ids += [*found.only_first, *found.only_second]
            findings.append(
                f"{key}: mergekit would align the vocabularies by token, but rpam "
                f"merges by token id, and {len(ids)} ids have other tokens in {base} "
                f"than in {other}: {found.named(ids)}. {leave_out}"
            )
    ids = sorted(mine.get_vocab().values())
    if ids != list(range(len(ids))) or len(ids) > rows:
        findings.append(
            f"{key}: mergekit cannot use the tokenizer of {base}: its {len(ids)} "
            f"tokens have ids up to {ids[-1]}; they would have to be 0 to "
            f"{len(ids) - 1}, of {rows} rows of the embedding. {leave_out}"
        )
    return findings


def end_notes(
    models: Sequence[ModelReference],
    configs: Mapping[ModelReference, PretrainedConfig],
    tokenizers: Mapping[ModelReference, PreTrainedTokenizerBase],
    options: MergeOptions,
) -> list[str]:
    """Return notes on the tokens that end a response: of the models, base first."""
    base, *others = models
    ends = {m: _ends(m, configs[m], options) for m in models}

    def named(ids: Collection[int]) -> str:
        token = tokenizers[base].convert_ids_to_tokens
        return " or ".join(f"{i} ({token(i)!r})" for i in sorted(ids))

    notes = [
        f"responses end with {named(ends[base])} in {base}, with {named(ends[other])} "
        f"in {other}; the merged model ends where the base does"
        for other in others
        if ends[other] != ends[base] and ends[other] and ends[base]
    ]
    own = tokenizers[base].eos_token_id
    if own is not None and ends[base] and own not in ends[base]:
        notes.append(
            f"{base}: its tokenizer ends with {named({own})}, its generation config "
            f"with {named(ends[base])}"
        )
    return notes


def _ends(
    model: ModelReference, config: PretrainedConfig, options: MergeOptions
) -> set[int]:
    """Return the ids that end a response; none where nothing is said."""
    found = getattr(config.get_text_config(), "eos_token_id", None)
    with suppress(Exception):  # there is none, or it cannot be had
        found = GenerationConfig.from_pretrained(
            model.model.path, revision=model.model.revision
        ).eos_token_id
    return {found} if isinstance(found, int) else set(found or ())
