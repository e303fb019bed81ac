"""A planned merge as its pre-pass sees it: what was checked, and what is to be run.

`mergekit.merge` and `mergekit.plan` are imported when they are needed: they may be the
ones whose import imports this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import click
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from rpam_mergekit.chat.prompts import (
    EncodedQuery,
    encode_calibration,
    end_token,
    make_batches,
)
from rpam_mergekit.checks.examine import Examined, check_merge, config_notes
from rpam_mergekit.models.adapters import merge_adapters
from rpam_mergekit.models.checkpoint import plan_layout
from rpam_mergekit.models.tokenizers import load_tokenizer
from rpam_mergekit.models.weights import ExpertWeights
from rpam_mergekit.prepass.memory import (
    activation_bytes,
    check_disk,
    choose_shelf,
    coefficient_bytes,
    readable,
)
from rpam_mergekit.prepass.run import PrePass
from rpam_mergekit.processes import Processes, local_device
from rpam_mergekit.replay.decoder import Decoder
from rpam_mergekit.routing.figures import SCALES
from rpam_mergekit.routing.holdout import as_many, split_queries

PLACES = {"device": "the device", "host": "the host", "disk": "disk"}
_checked: ContextVar[tuple[MergeConfiguration, Examined] | None] = ContextVar(
    "checked", default=None
)


@contextmanager
def already_checked(config: MergeConfiguration, examined: Examined) -> Iterator[None]:
    """Let plans of `config` within take `examined` for what its check has found."""
    token = _checked.set((config, examined))
    try:
        yield
    finally:
        _checked.reset(token)


def plan(
    config: MergeConfiguration,
    options: MergeOptions,
    examined: Examined,
    processes: Processes | None = None,
) -> Planned:
    """Do what mergekit does before it plans a merge, the downloads included.

    Of several `processes` the first downloads and merges adapters.
    """
    from mergekit.merge import _model_out_config
    from mergekit.plan import MergePlanner

    processes = processes or Processes()
    architecture = get_architecture_info(config, options)
    LoaderCache().setup(options=options)
    trusted = options.trust_remote_code
    out_config = _model_out_config(config, architecture, trust_remote_code=trusted)
    if processes.rank == 0:
        merge_adapters(config.referenced_models(), options)
        for model in config.referenced_models():
            LoaderCache().get(model)
    processes.tell(None)
    planner = MergePlanner(config, architecture, options, out_config)
    with already_checked(config, examined):
        return Planned(planner, processes)


class Planned:
    """A merge that mergekit is about to plan, and has been checked.

    planner: mergekit's `MergePlanner`. fixed: the weights that the user set, by entry.
    Raises `RpamError` for whatever is wrong with the config.
    """

    def __init__(self, planner: Any, processes: Processes | None = None) -> None:
        self.planner = planner
        self.config, self.options = planner.config, planner.options
        self.processes = processes or Processes()
        found = _checked.get()
        if found is not None and found[0] is self.config:
            examined = found[1]
        else:
            examined = check_merge(self.config, self.options)
        assert examined.request is not None
        self.request = examined.request
        self.notes = examined.notes
        self.models = self.request.models
        trusted = self.options.trust_remote_code
        # Of the models as they are: slices may have other layers.
        self.base_config = self.models.base.config(trust_remote_code=trusted)
        self.layout = plan_layout(
            planner.arch_info, self.base_config, self.models.every
        )
        self.fixed = self.request.fixed_weights(self.layout)
        self.end_token: int | None = None  # known once the queries are

    def say(self, text: str) -> None:
        """Tell the user something; only the first process does."""
        if not self.options.quiet and self.processes.rank == 0:
            click.echo(text, err=True)

    def say_notes(self) -> None:
        """Tell what is worth a look though it may be merged."""
        for note in [*self.notes, *config_notes(self.models, self.options)]:
            self.say(f"rpam: {note}")

    def queries(self) -> list[EncodedQuery]:
        """Return the drawn calibration queries as the merged model will see them."""
        from mergekit.merge import _set_chat_template

        tokenizer = load_tokenizer(self.models.base, self.options)
        _set_chat_template(tokenizer, self.config)
        self.end_token = end_token(tokenizer)
        assert self.request.calibration is not None
        queries, notes = encode_calibration(
            self.request.calibration,
            tokenizer,
            self.base_config.get_text_config().vocab_size,
            self.request.settings,
            self.request.template.thinking,
        )
        for note in notes:
            self.say(f"rpam: {note}")
        return queries

    def prepass(self, queries: Sequence[EncodedQuery]) -> PrePass:
        """Return the pre-pass. Raises `RpamError` for what cannot be replayed."""
        options, settings = self.options, self.request.settings
        decoder = Decoder(
            self.base_config,
            local_device(options.device or "cpu"),
            options.trust_remote_code,
            settings.compute_dtype,
        )
        solving, held_out = split_queries(queries, settings.held_out, settings.seed)
        return PrePass(
            ExpertWeights(
                self.models,
                self.layout,
                decoder,
                self.config.dtype,
                self.config.out_dtype,
            ),
            make_batches(solving, settings),
            settings,
            fixed=self.fixed,
            processes=self.processes,
            quiet=options.quiet,
            held_out=make_batches(held_out, settings),
            of_solved=make_batches(as_many(solving, held_out, settings.seed), settings),
            end=self.end_token,
        )


def make_room(prepass: PrePass, folder: Path) -> str:
    """Give the pre-pass a shelf, with files in `folder`; return what lies where.

    Raises `RpamError` if the disk is too small for them or for the coefficients.
    """
    settings, processes = prepass.settings, prepass.processes
    check_disk(
        folder,
        2 * coefficient_bytes(prepass.decoder, settings, len(prepass.models.others)),
        "the coefficients, by layer and as a whole,",
    )
    width = prepass.decoder.model.config.get_text_config().hidden_size
    experts = len(prepass.models.every)
    size = activation_bytes(prepass.batches, width, experts)
    probes = [batch for of in prepass.measured.values() for batch in of]
    size += activation_bytes(probes, width, experts + len(SCALES))
    prepass.shelf = choose_shelf(
        settings.activations,
        size // processes.count,
        prepass.decoder.device,
        folder / f"activations-{processes.rank}",
    )
    queries = sum(len(batch.patterns) for batch in prepass.batches)
    tokens = sum(int(batch.attention_mask.sum()) for batch in prepass.batches)
    steps, count = settings.steps_of(len(prepass.batches)), len(prepass.batches)
    seen = (
        f"; {steps} steps a layer see {steps / count:.0%} of the {count} batches"
        if settings.solver == "adam" and steps < count
        else ""
    )
    of = f", {processes.count} processes" if processes.count > 1 else ""
    return (
        f"{queries} queries, {tokens} tokens; activations of {readable(size)} on "
        f"{PLACES[prepass.shelf.place]}{of}{seen}"
    )
