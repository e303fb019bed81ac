"""A merge as others can read it: the config that repeats it, its record and card.

Models have names of the Hub: folders of this machine mean nothing to others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from mergekit.common import ModelReference

from rpam_mergekit.errors import RpamError, suggestion
from rpam_mergekit.folder.contents import COEFFICIENTS
from rpam_mergekit.outputs.card import HUB_NAME, front_matter, with_front_matter

HEAD = """\
# Repeats the merge by its coefficients, without calibration data or a pre-pass.
# With mergekit and rpam-mergekit installed:
#   mergekit-yaml rpam.yml out/
"""


@dataclass
class ModelNames:
    """The Hub names of a merge's models.

    `given`: names for local models, of the option --model. `recorded`: the names in
    rpam.json, where a local model has only its folder's name. `local` collects the
    models without a Hub name, `used` those of `given` that occur.
    """

    given: Mapping[str, str]
    recorded: frozenset[str]
    local: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def public(self, value: Any) -> str:
        """Return a model of a config, with an adapter or not, by Hub names."""
        reference = ModelReference.model_validate(value)
        parts = [part for part in (reference.model, reference.lora) if part]
        return "+".join(self._part(str(part), part.path) for part in parts)

    def _part(self, text: str, path: str) -> str:
        for name in (text, path):
            if name in self.given:
                self.used.add(name)
                return self.given[name]
        known = not self.recorded or text in self.recorded
        if not known or not HUB_NAME.fullmatch(text) or Path(path).exists():
            self.local.append(text)
        return text


def public_config(
    source: str,
    record: Mapping[str, Any],
    given: Mapping[str, str],
    coefficients: str,
) -> tuple[str | None, list[str], list[str]]:
    """Return the reader's config, its models, and the models without a Hub name.

    `source` is the merge's own config; `coefficients` names the published file. There
    is no config if there is a model without a name. Raises `RpamError` for a name in
    `given` that is not of the Hub or not in the config.
    """
    config = yaml.safe_load(source)
    recorded = {
        part
        for model in record.get("models") or []
        for part in str(model["model"]).split("+")
    }
    names = ModelNames(given, frozenset(recorded))
    base = config.get("base_model")
    if base is not None:
        config["base_model"] = names.public(base)
    # Once each: YAML's anchors make one mapping of several places.
    inputs = list({(id(one), key): (one, key) for one, key in _inputs(config)}.values())
    for one, key in inputs:
        one[key] = names.public(one[key])
    _check(names)
    models = [str(config.get("base_model") or "")]
    models += [one[key] for one, key in inputs]
    models = [name for name in dict.fromkeys(models) if name]
    if names.local:
        return None, models, list(dict.fromkeys(names.local))
    parameters = dict(config.get("parameters") or {})
    parameters.pop("calibration", None)
    config["parameters"] = {**parameters, "coefficients": coefficients}
    return HEAD + yaml.safe_dump(config, sort_keys=False), models, []


def _inputs(config: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every mapping of a config that names an input model, and the key."""
    for part in (config, *(config.get("modules") or {}).values()):
        for model in part.get("models") or []:
            yield model, "model"
        for one in part.get("slices") or []:
            if one.get("base_model") is not None:
                yield one, "base_model"
            for source in one.get("sources") or []:
                yield source, "model"


def _check(names: ModelNames) -> None:
    findings = [
        f"--model {local}={name}: '{name}' is no name of a Hub model. Expected "
        "owner/name, or owner/name@revision."
        for local, name in names.given.items()
        if not HUB_NAME.fullmatch(name)
    ]
    for local in names.given.keys() - names.used:
        known = suggestion(local, names.local) if names.local else ""
        findings.append(
            f"--model {local}={names.given[local]}: the merge has no model '{local}'."
            f"{known}"
        )
    if findings:
        raise RpamError(*findings)


def public_record(record: Mapping[str, Any], models: list[str]) -> dict[str, Any]:
    """Return the record by Hub names, with the coefficients beside it."""
    coefficients = {**record["coefficients"], "path": COEFFICIENTS}
    found = list(record.get("models") or [])
    if len(models) == len(found):
        pairs = zip(found, models, strict=True)
        found = [{**model, "model": name} for model, name in pairs]
    return {**record, "models": found, "coefficients": coefficients}


def public_card(
    card: str, given: Mapping[str, str], models: list[str], recipe: str | None
) -> str:
    """Return a model card by Hub names, and with `recipe` for the merge's config."""
    for local, name in given.items():
        places = r"^\* |\busing |\b(?:base_model|model):\s*[\"']?"
        pattern = rf"({places}){re.escape(local)}(?=[\s\"'.]|$)"
        replaced = partial(_named_so, name)
        card = re.sub(pattern, replaced, card, flags=re.MULTILINE)
    if models:
        names = [part.partition("@")[0] for m in models for part in m.split("+")]
        base = {
            "base_model": list(dict.fromkeys(names)),
            "base_model_relation": "merge",
        }
        card = with_front_matter(card, {**front_matter(card), **base})
    if recipe is not None and "```yaml\n" in card:
        head, _, rest = card.partition("```yaml\n")
        card = f"{head}```yaml\n{recipe}```{rest.partition('```')[2]}"
    return card


def _named_so(name: str, found: re.Match[str]) -> str:
    return f"{found[1]}{name}"
