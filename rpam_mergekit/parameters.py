"""A config's `parameters:` read as settings; what is wrong with them, all at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from rpam_mergekit.errors import RpamError, suggestion
from rpam_mergekit.settings import (
    NO_BRACKETS,
    PRESETS,
    SCALAR_GRANULARITIES,
    RpamSettings,
)

SHORTEST = 16  # of max_response_tokens: both brackets and the end with their contexts


def parse_settings(parameters: Mapping[str, Any]) -> RpamSettings:
    """Return the settings that a config's top-level `parameters` describe.

    `weight` is left to mergekit. Raises `RpamError` with one finding for every
    unknown name (with a suggestion), wrong value and impossible combination.
    """
    given = {k: v for k, v in parameters.items() if k != "weight"}
    known = [*RpamSettings.model_fields, "weight"]
    unknown = [name for name in given if name not in RpamSettings.model_fields]
    findings = [
        f"parameters.{name}: unknown parameter.{suggestion(name, known)}"
        for name in unknown
    ]
    for name in unknown:
        del given[name]
    for name, value in list(given.items()):
        if not isinstance(value, (bool, int, float, str)):
            findings.append(
                f"parameters.{name}: found a list or filter; it takes one value for "
                "the whole merge."
            )
            del given[name]
    preset = dict(PRESETS.get(str(given.get("preset", "default")), {}))
    if "steps" in given:
        preset.pop("epochs", None)
    findings += _idle(given, preset)
    try:
        settings = RpamSettings(**{**preset, **given})
    except ValidationError as error:
        findings += [_finding(e) for e in error.errors()]
        raise RpamError(*findings) from None
    if settings.solver == "lbfgs" and settings.granularity not in SCALAR_GRANULARITIES:
        findings.append(
            f"parameters.solver: 'lbfgs' needs few coefficients, but granularity is "
            f"'{settings.granularity}'. Use solver adam, or granularity "
            f"{', '.join(SCALAR_GRANULARITIES)}."
        )
    findings += _brackets(settings)
    if 0 < settings.max_response_tokens < SHORTEST:
        findings.append(
            f"parameters.max_response_tokens: found {settings.max_response_tokens}. "
            f"Input should be 0, which is all, or at least {SHORTEST}."
        )
    if findings:
        raise RpamError(*findings)
    return settings


def _brackets(settings: RpamSettings) -> list[str]:
    """Return what is wrong with the brackets that the settings name."""
    one, other = settings.think_open, settings.think_close
    if one == NO_BRACKETS and other is not None:
        return [
            f"parameters.think_close: found {other!r}, but think_open is "
            f"'{NO_BRACKETS}'. Name both brackets, or leave think_close out."
        ]
    if (one is None and other is None) or one == NO_BRACKETS or settings.markers():
        return []
    lacking, there = ("think_close", one) if other is None else ("think_open", other)
    return [
        f"parameters.{lacking}: missing. {there!r} is of no known pair of brackets: "
        "name the text that opens the thinking and the one that closes it."
    ]


def _idle(given: Mapping[str, Any], preset: Mapping[str, Any]) -> list[str]:
    """Return findings on parameters that would do nothing beside others."""
    found = []
    if "steps" in given and given.get("epochs") is not None:
        found.append(
            "parameters.steps: found beside epochs, which is used in its place. Name "
            "one of them."
        )
    elif "steps" in given and given.get("solver") == "lbfgs":
        found.append(
            "parameters.steps: found beside solver 'lbfgs', which counts iterations in "
            "epochs. Name epochs."
        )
    whole = {**preset, **given}
    if whole.get("tokens") == "prompt" and given.get("max_response_tokens"):
        found.append(
            "parameters.max_response_tokens: found beside tokens 'prompt', which has "
            "no responses. Use tokens 'prompt+response'."
        )
    if whole.get("alignment") == "sum" and given.get("decision_weight"):
        found.append(
            "parameters.decision_weight: found beside alignment 'sum', which weighs "
            "every token alike. Use alignment 'relative'."
        )
    return found


def _finding(error: Any) -> str:
    name, value = error["loc"][0], error["input"]
    hint = ""
    if error["type"] == "literal_error":
        expected = error["ctx"]["expected"]
        hint = suggestion(
            str(value), expected.replace("'", "").replace(" or ", ", ").split(", ")
        )
    return f"parameters.{name}: found {value!r}. {error['msg']}.{hint}"
