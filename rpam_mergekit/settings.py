"""Every setting of the method, once: YAML, fingerprint and documentation use it.

They are the flat scalars of a config's top-level `parameters:`. Per model, `weight`
(fixes tensors by filter) and `pattern` are the only ones.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rpam_mergekit.grading.brackets import KNOWN
from rpam_mergekit.grading.responses import Markers
from rpam_mergekit.text import markdown_table

NAME = "rpam"  # of the method, as configs and records have it
SCALAR_GRANULARITIES = ("layer", "module", "tensor")
MODEL_PARAMETERS = ("weight", "pattern")
# Parameters that do not change what is solved, or are spelt out by others.
NOT_IN_CACHE_KEY = {"calibration", "coefficients", "preset", "activations", "reasoning"}
LBFGS_ITERATIONS = 15

# What files say nothing of that were solved before these settings were there.
BEFORE_THINKING = {"thinking": "template", "think_open": None, "think_close": None}
# Defaults of which files say nothing, so that those from before are as good as ever.
UNSAID = {"max_response_tokens": 0}
NO_BRACKETS = "none"  # of think_open: Long thinks without
# What a preset changes; a parameter that the config names itself stays as named.
# arXiv 2601.03506: prompts only, summed squared error, omega against that sum, one
# coefficient per weight element from 0.5, embeddings and head at 0.5.
_PAPER: dict[str, Any] = {
    "granularity": "element",
    "tokens": "prompt",
    "prompt_weight": 1.0,
    "long_share": 0.5,
    "decision_weight": 0.0,
    "opening_weight": 0.0,
    "alignment": "sum",
    "token_scale": "none",
    "contrastive_weight": 1000.0,
    "outside_weight": 0.5,
    "regularization": 0.0,
    "learning_rate": 0.01,
    "epochs": 50,
    "batch_tokens": 0,
    "batch_size": 16,
    "queries_per_pattern": 64,
    "held_out": 0.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": _PAPER,
    "qa-merging": {**_PAPER, "layers": 0.3},
}


class RpamSettings(BaseModel):
    """The method's settings, validated and frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration: str | None = Field(
        None, description="Path of the pattern-labelled calibration file (JSONL)."
    )
    coefficients: str | None = Field(
        None,
        description=(
            "Path of the coefficients file to write, and to reuse when it was made "
            "from the same models, calibration and settings. By default "
            "rpam/coefficients.safetensors in the output folder. Without "
            "`calibration`, the file is used as it is."
        ),
    )
    preset: Literal["default", "paper", "qa-merging"] = Field(
        "default",
        description="Set of defaults: ours, or those of the paper (prompts only, "
        "summed squared error, omega, one coefficient per element); `qa-merging` is "
        "its second version, which optimises the most divergent 30 % of the layers.",
    )
    granularity: Literal["low_rank", "element", "row", "tensor", "module", "layer"] = (
        Field(
            "low_rank",
            description="What shares one merging coefficient: a layer, a module of a "
            "layer, a tensor, a row, an element; or a low-rank field over a weight.",
        )
    )
    rank: int = Field(
        16, ge=0, le=256, description="Rank of the product term of `low_rank` fields."
    )
    tokens: Literal["prompt", "prompt+response"] = Field(
        "prompt+response", description="Tokens whose hidden states are aligned."
    )
    thinking: Literal["model", "template"] = Field(
        "model",
        description="Who opens the thinking where the chat template ends its prompts "
        "in an opened block: `model` takes that opening out of the calibration "
        "prompts and of the output's template, so that the merged model decides; "
        "`template` keeps it: every response thinks.",
    )
    think_open: str | None = Field(
        None,
        min_length=1,
        description="Text that opens Long's thinking, if not recognised from template "
        "and responses (`<think>`, `[THINK]`, `<|channel|>analysis<|message|>` and "
        "others are); `none`: it thinks without brackets.",
    )
    think_close: str | None = Field(
        None, min_length=1, description="Text that closes what `think_open` opens."
    )
    prompt_weight: float = Field(
        0.1,
        ge=0,
        description="Weight of a prompt token, relative to the tokens from which the "
        "response is predicted (the prompt's last and the response's).",
    )
    long_share: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="Share of the objective that lies on queries of the pattern "
        "`long`: above 0.5, the merged model reasons more readily.",
    )
    decision_weight: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of a query's objective that lies on its decisions alone: "
        "the tokens from which the response's first token (thinking is opened there or "
        "not), the closing of the thinking and the end are predicted.",
    )
    alignment: Literal["relative", "sum"] = Field(
        "relative",
        description="`relative`: every query weighs the same and 1 is the distance "
        "of the two experts; `sum`: squared error summed over tokens, as published.",
    )
    token_scale: Literal["capped", "length", "none"] = Field(
        "capped",
        description="What a token's squared distance is divided by. `capped`: tokens "
        "whose hidden states are longer than usual (massive activations) count as if "
        "they were twice as long as usual, the others as they are; `length`: every "
        "token's own squared length, relative to the usual one; `none`: nothing.",
    )
    contrastive_weight: float = Field(
        0.0, ge=0, description="Weight of the contrastive term (omega)."
    )
    temperature: float = Field(
        0.1, gt=0, description="Temperature of the contrastive term (tau)."
    )
    initial_weight: float = Field(
        0.5,
        description="Coefficient from which the optimisation starts: the share of "
        "the model that is not the base.",
    )
    outside_weight: float = Field(
        0.0, description="Coefficient of embeddings, final norm and head; 0 is base."
    )
    layers: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the decoder layers that is optimised: those in which "
        "the two models' hidden states diverge most. The others keep "
        "`initial_weight`.",
    )
    regularization: float = Field(
        0.0,
        ge=0,
        description="Weight of the mean squared departure from `initial_weight`.",
    )
    solver: Literal["adam", "lbfgs"] = Field(
        "adam",
        description="Adam, or L-BFGS (granularities layer, module and tensor only).",
    )
    learning_rate: float = Field(0.05, gt=0, description="Adam's learning rate.")
    steps: int = Field(
        800, ge=1, description="Optimisation steps per layer, of one batch each."
    )
    epochs: int | None = Field(
        None,
        ge=1,
        description="Passes over the calibration set per layer, in place of `steps`; "
        "of L-BFGS the iterations (15).",
    )
    tolerance: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="A layer is left early when two passes running lower the objective "
        "by less than this share (Adam); 0 never leaves early.",
    )
    batch_tokens: int = Field(
        256,
        ge=0,
        description="Tokens per batch, padding included; a batch has one query at "
        "least. 0 is no limit.",
    )
    batch_size: int | None = Field(
        None, ge=1, description="Queries per batch, at most."
    )
    queries_per_pattern: int = Field(
        512, ge=1, description="Calibration queries drawn for each pattern."
    )
    max_tokens: int = Field(
        2048,
        ge=1,
        description="Longest query in tokens: longer prompts are left out, responses "
        "cut, and both are reported.",
    )
    max_response_tokens: int = Field(
        0,
        ge=0,
        description="Tokens of a response that are replayed; of a longer one those at "
        "its beginning, around the closing of its thinking and at its end. 0: all.",
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Of the pre-pass's matrix products: `auto` is bfloat16 on GPUs "
        "with matrix units for it, float32 elsewhere; float32 on an NVIDIA GPU is "
        "TF32. Weights, coefficients and sums stay in float32.",
    )
    coefficient_dtype: Literal["float32", "float16"] = Field(
        "float32",
        description="Of the fields in the coefficients file: float16 halves it. They "
        "are rounded before a layer's merged weights are made, so that the file holds "
        "what was optimised. Scalars are always float32.",
    )
    activations: Literal["auto", "device", "host", "disk"] = Field(
        "auto",
        description="Where the calibration set's hidden states lie: on the device, in "
        "host memory, or in files beside the coefficients; `auto` is the first with "
        "room. The result is the same.",
    )
    opening_weight: float = Field(
        0.3,
        ge=0,
        description="Weight of a further term in the last layer: the cross-entropy of "
        "whether thinking is opened, through final norm and head. A model whose "
        "template has always opened its thinking may not do so by itself.",
    )
    held_out: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="Share of each pattern's calibration queries that is held out of "
        "the solving (16 at least, none if a pattern has fewer than 64): on them the "
        "operating point is chosen, and it is measured whether the merge routes.",
    )
    reasoning: float = Field(
        0.0,
        ge=-1,
        le=1,
        description="Shift of the operating point: 0 as calibrated on held-out "
        "queries; above it the merged model reasons more readily, at 1 its layers are "
        "those of the model that thinks, which must be the base; below it less. Needs "
        "no new pre-pass.",
    )
    seed: int = Field(
        0, ge=0, description="Seed of the draw of queries, the batches and the fields."
    )

    def cache_key(self) -> dict[str, Any]:
        """Return the settings on which the coefficients depend."""
        found = self.model_dump(exclude=NOT_IN_CACHE_KEY)
        unsaid = {name for name in UNSAID if found[name] == UNSAID[name]}
        return {name: value for name, value in found.items() if name not in unsaid}

    def steps_of(self, batches: int) -> int:
        """Return how many steps a layer is optimised for, on so many batches."""
        if self.solver == "lbfgs":
            return self.epochs or LBFGS_ITERATIONS
        return self.steps if self.epochs is None else self.epochs * batches

    def markers(self) -> Markers | None:
        """Return the brackets that the settings name, None where they name none.

        One of a known pair names both.
        """
        one, other = self.think_open, self.think_close
        if one == NO_BRACKETS or one is other is None:
            return None
        if one is not None and other is not None:
            return Markers(one, other)
        return next((m for m in KNOWN if one == m.open or other == m.close), None)


def settings_table() -> str:
    """Return the settings as the Markdown table of docs/settings.md."""
    rows = [
        [
            f"`{name}`",
            "" if field.default is None else f"`{field.default}`",
            field.description,
        ]
        for name, field in RpamSettings.model_fields.items()
    ]
    return "\n".join(markdown_table(["parameter", "default", ""], rows))
