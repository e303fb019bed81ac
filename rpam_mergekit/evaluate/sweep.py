"""The interpolation sweep: plain mixes of the two experts, merged by mergekit.

Each weight is merged into a folder of its own, sampled by `mergekit-rpam sample` in a
process of its own, and deleted again unless it is kept. What is finished is not done
again: a sweep that was stopped goes on with the weight at which it stopped. Its models,
queries and settings stand in `sweep.json`; others are refused, never mixed in. Where
the merge takes the opening of the thinking out of the chat template, so does the sweep:
its models are asked as the merged one is.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import yaml

from rpam_mergekit.errors import RpamError, refuse
from rpam_mergekit.formats.samples import SampleReader, flat
from rpam_mergekit.parameters import parse_settings
from rpam_mergekit.sampling.request import Location, SamplingOptions, Say, log
from rpam_mergekit.sampling.sample import questions_of
from rpam_mergekit.settings import BEFORE_THINKING, RpamSettings

MOST_WEIGHTS = 1001
# Options of sampling that change the responses, besides the data set.
SAMPLED_BY = (
    "samples",
    "limit",
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "seed",
    "dtype",
    "think_open",
    "think_close",
    "opened_by_prompt",
)


def parse_weights(text: str) -> list[Decimal]:
    """Return the weights that ``0:1:0.05`` or ``0.3,0.35,0.4`` name, exactly.

    A weight is the share of the model that is not the base. Raises `RpamError` for
    anything else.
    """
    try:
        if ":" in text:
            first, last, step = (Decimal(part) for part in text.split(":"))
            if step <= 0 or last < first or (last - first) / step >= MOST_WEIGHTS:
                raise ValueError
            count = int((last - first) / step)
            weights = [first + n * step for n in range(count + 1)]
        else:
            weights = sorted({Decimal(part) for part in text.split(",")})
    except (ValueError, InvalidOperation):
        raise RpamError(
            f"--weights: found '{text}', expected FIRST:LAST:STEP, such as 0:1:0.05, "
            "or a list, such as 0.3,0.35,0.4."
        ) from None
    if not all(weight.is_finite() for weight in weights):
        raise RpamError(f"--weights: found '{text}', expected finite numbers.")
    return weights


def interpolation(config: dict[str, Any], weight: Decimal) -> dict[str, Any]:
    """Return the mergekit config of one plain interpolation.

    `config` is one of `rpam`: base + weight * (other - base) of its two models, with
    its dtypes. Raises `RpamError` if it does not name them.
    """
    from rpam_mergekit.models.references import same_text  # imports mergekit

    base = config.get("base_model")
    others = [
        entry["model"]
        for entry in config.get("models") or ()
        if isinstance(entry, dict)
        and entry.get("model") is not None
        and not same_text(entry["model"], base)
    ]
    if base is None or len(others) != 1:
        raise RpamError(
            "CONFIG: expected base_model and one other model under models, as in a "
            "config of rpam."
        )
    kept = ("dtype", "out_dtype", "tokenizer", "chat_template")
    return {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": others[0], "parameters": {"weight": float(weight)}}],
        **{name: config[name] for name in kept if name in config},
    }


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """Merge and sample the plain interpolations of the two models of a config.

    config: one of `rpam`. weights: shares of the model that is not the base. out:
    folder for the sample files. sampling: of every model. keep: keep the models.
    """

    config: Location
    weights: Sequence[Decimal]
    out: Location
    sampling: SamplingOptions
    keep: bool = False


def sweep(request: SweepRequest, say: Say = log) -> list[Path]:
    """Merge and sample every weight; return the sample files.

    Raises `RpamError` for configs and data sets that cannot be, before anything is
    merged, and where a merge or its sampling fails.
    """
    from rpam_mergekit.checks.config_file import read_config  # imports mergekit
    from rpam_mergekit.models.quantised import quantised_among

    out, sampling = Path(request.out), request.sampling
    if sampling.base_url:
        raise RpamError("--base-url: cannot be given to a sweep's sampling.")
    recipe = dict(read_config(request.config).content)
    recipes = {weight: interpolation(recipe, weight) for weight in request.weights}
    plain = interpolation(recipe, Decimal(0))
    named = (plain["base_model"], plain["models"][0]["model"])
    refuse(quantised_among(map(str, named)))
    thinking = thinking_settings(recipe)
    identity = {**_models(recipe), **_sampled_as(sampling)}
    if thinking != parse_settings({}):
        identity["thinking"] = thinking.model_dump(include={*BEFORE_THINKING})
    out.mkdir(parents=True, exist_ok=True)
    _claim(out / "sweep.json", identity)
    finished: list[Path] = []
    for number, (weight, one) in enumerate(recipes.items(), 1):
        name = f"w{weight.normalize():f}"
        samples = out / f"{name}.samples.jsonl"
        say(f"weight {weight} ({number} of {len(recipes)})")
        finished.append(samples)
        if samples.exists() and _is_finished(samples):
            say(f"{samples} is finished")
            continue
        model = out / name
        if not model.exists():
            _merge(one, model, out / "adapters", thinking)
        command = [*_command("sample"), str(model), "--out", str(samples)]
        _run([*command, *sampling.arguments()])
        if not request.keep:
            shutil.rmtree(model)
    return finished


def _sampled_as(sampling: SamplingOptions) -> dict[str, Any]:
    """Return what tells this sweep's samples from others'."""
    return {
        "sampling": {name: getattr(sampling, name) for name in SAMPLED_BY},
        "dataset": questions_of(sampling).description,
    }


def _models(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return what tells this sweep's models from others'."""
    from rpam_mergekit.sampling.local import local_digest

    plain = interpolation(recipe, Decimal(0))
    base, other = plain["base_model"], plain.pop("models")[0]["model"]
    digests = {str(model): local_digest(str(model)) for model in (base, other)}
    return {"merge": plain, "other_model": other, "weights_digests": digests}


def _claim(path: Path, identity: dict[str, Any]) -> None:
    """Write `identity`, or raise `RpamError` if the folder's sweep has another."""
    content = json.dumps(identity, indent=1, default=str) + "\n"
    if not path.exists():
        path.write_text(content, encoding="utf-8")
    found = path.read_text(encoding="utf-8")
    if found != content:
        old, new = (flat(json.loads(text)) for text in (found, content))
        raise RpamError(
            *(
                f"{path}: {key}: this sweep was made with {old.get(key)!r}, now it is "
                f"{new.get(key)!r}."
                for key in dict.fromkeys([*old, *new])
                if old.get(key) != new.get(key)
            ),
            "Sweeps are not mixed: name another folder with --out.",
        )


def _is_finished(samples: Path) -> bool:
    reader = SampleReader(samples)
    for _ in reader:
        pass
    return reader.finished


def thinking_settings(config: dict[str, Any]) -> RpamSettings:
    """Return what a config of `rpam` says of who opens the thinking."""
    given = config.get("parameters") or {}
    return parse_settings({n: given[n] for n in BEFORE_THINKING if n in given})


def _without_opening(model: Path, settings: RpamSettings) -> None:
    """Let a model decide whether it thinks, where the merged model is to."""
    from rpam_mergekit.chat.template_files import take_out, tokenizer_in
    from rpam_mergekit.chat.thinking import thinking_of

    tokenizer = tokenizer_in(model)
    if tokenizer is not None:
        take_out(model, thinking_of(tokenizer, tokenizer.chat_template, (), settings))


def _merge(
    recipe: dict[str, Any], model: Path, adapters: Path, thinking: RpamSettings
) -> None:
    """Merge into `model`, which is there only when it is whole.

    `adapters` is where mergekit keeps models with a LoRA adapter merged into them.
    """
    partial = model.with_name(f".{model.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    path = partial / "sweep.yml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    names = (recipe["base_model"], recipe["models"][0]["model"])
    cache = ["--lora-merge-cache", str(adapters)] if any(map(_adapted, names)) else []
    _run([*_command("merge"), str(path), str(partial), *cache])
    _without_opening(partial, thinking)
    partial.rename(model)


def _adapted(model: Any) -> bool:
    from rpam_mergekit.sampling.local import reference_of

    return reference_of(str(model)).lora is not None


def _command(name: str) -> list[str]:
    return [sys.executable, "-m", "rpam_mergekit.cli", name]


def _run(command: list[str]) -> None:
    process = subprocess.run(command, check=False)
    if process.returncode:
        raise RpamError(
            f"the sweep stopped (exit status {process.returncode}) at: "
            f"{' '.join(command[2:])}. Run the same command to go on."
        )
