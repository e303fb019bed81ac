"""The section on the merge in a model card, made from the record of the merge.

mergekit writes README.md: YAML front matter, '### Merge Method' and the config. What
is added stands between two markers, and is replaced when it is made again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from rpam_mergekit.errors import RpamError, first_line
from rpam_mergekit.evaluate.routing_report import NOTE, summary, table, warnings
from rpam_mergekit.settings import PRESETS, RpamSettings
from rpam_mergekit.text import markdown_table

START, END = "<!-- rpam -->", "<!-- /rpam -->"
TAGS = ("rpam", "reasoning")
PAPER = "https://arxiv.org/abs/2601.03506"
STANDS_FOR = {
    "long": "long: reasons at length (Long-CoT)",
    "short": "short: answers at once (Short-CoT)",
}
_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_SECTION = re.compile(rf"{re.escape(START)}.*?{re.escape(END)}\n?", re.DOTALL)
_CONFIG = re.compile(r"^### Configuration[ \t]*$", re.MULTILINE)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?:@[\w./-]+)?")


def complete(
    readme: str,
    record: Mapping[str, Any],
    *,
    comparison: str | None = None,
    recipe: str | None = None,
    weights: bool = True,
) -> str:
    """Return a model card with the section on the merge and its tags.

    `record` is the content of rpam.json; `comparison` a table in Markdown, as `compare`
    writes it; `recipe` the name of a config beside the card that repeats the merge by
    its coefficients; `weights` tells whether the model itself is beside the card. A
    card that is complete stays as it is. Raises `RpamError` for front matter that is
    no YAML mapping.
    """
    section = "\n".join(
        [
            START,
            "### Reasoning pattern alignment",
            "",
            *_method(record, weights),
            *markdown_table(["model", "reasoning pattern", ""], _models(record)),
            "",
            *_thinking(record),
            *_settings(record),
            *_calibration(record),
            *_routing(record),
            *_layers(record),
            *_reproduce(record, recipe),
            *_comparison(comparison),
            END,
            "",
        ]
    )
    card = _tagged(readme)
    if _SECTION.search(card):
        return _SECTION.sub(lambda _: section, card, count=1)
    place = _CONFIG.search(card)
    if place is None:
        return f"{card.rstrip()}\n\n{section}"
    return f"{card[: place.start()]}{section}\n{card[place.start() :]}"


def front_matter(readme: str) -> dict[str, Any]:
    """Return the metadata of a model card. Raises `RpamError` if it is no mapping."""
    found = _MATTER.match(readme)
    try:
        matter = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        raise RpamError(
            f"README.md: the front matter is not YAML: {first_line(error)}. Correct "
            "what stands between the first two lines of ---."
        ) from None
    if not isinstance(matter or {}, dict):
        raise RpamError(
            f"README.md: the front matter is a {type(matter).__name__}, expected names "
            "with values, such as 'tags: [merge]'."
        )
    return matter or {}


def with_front_matter(readme: str, matter: Mapping[str, Any]) -> str:
    """Return a model card with its metadata replaced."""
    found = _MATTER.match(readme)
    text = yaml.safe_dump(dict(matter), sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n{readme[found.end() if found else 0 :]}"


def _tagged(readme: str) -> str:
    matter = front_matter(readme)
    tags = matter.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    lacking = [tag for tag in TAGS if tag not in tags]
    if not lacking:
        return readme
    return with_front_matter(readme, {**matter, "tags": [*tags, *lacking]})


def _method(record: Mapping[str, Any], weights: bool) -> list[str]:
    versions = record.get("versions") or {}
    version = versions.get("rpam_mergekit", "")
    paper = record.get("paper") or PAPER
    what = "This model was made" if weights else "The model of this recipe is made"
    software = ", ".join(
        f"{name} {versions[name]}"
        for name in ("mergekit", "torch", "transformers")
        if versions.get(name)
    )
    return [
        f"{what} by [RPAM, Reasoning Pattern Alignment Merging]({paper}), with the "
        f"independent implementation rpam-mergekit {version}"
        f"{f' ({software})' if software else ''}. For every layer, merging "
        "coefficients were optimised so that on each calibration query the merged "
        "hidden states follow those of the model whose reasoning pattern suits it.",
        "",
    ]


def _models(record: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            linked(str(model["model"])),
            STANDS_FOR.get(model["pattern"], str(model["pattern"])),
            str(model.get("role", "")),
        ]
        for model in record.get("models") or []
    ]


def linked(name: str) -> str:
    """Return a model's name, with a link if it is one of the Hub."""
    if not HUB_NAME.fullmatch(name):
        return name
    return f"[{name}](https://huggingface.co/{name.partition('@')[0]})"


def _thinking(record: Mapping[str, Any]) -> list[str]:
    thinking = record.get("thinking")
    if not thinking:
        return []
    opening, removed = thinking.get("opening"), thinking.get("removed_from_template")
    if not opening:
        return [
            "The model decides whether it thinks: its chat template opens no thinking.",
            "",
        ]
    ends = f"that of the base ends every prompt with {code(opening)}"
    if thinking.get("mode") == "template":
        return [
            "Every response thinks, none is given at once: the chat template ends "
            f"every prompt with {code(opening)}, and the merge was made for that "
            "(`thinking: template`).",
            "",
        ]
    if removed:
        return [
            "The model decides whether it thinks: the opening was taken out of its "
            f"chat template, {ends}. Serve it with the template that is here.",
            "",
        ]
    return [
        "The model decides whether it thinks, if it is served with a chat template "
        f"that opens no thinking; {ends}, and no template is here.",
        "",
    ]


def code(text: str) -> str:
    """Return a text as code of one line, its line breaks as escapes."""
    return f"`{repr(text)[1:-1]}`"


def _settings(record: Mapping[str, Any]) -> list[str]:
    settings = record.get("settings") or {}
    defaults = RpamSettings().cache_key()  # type: ignore[call-arg]
    # `auto` is not recorded, but what it was on the device.
    defaults["compute_dtype"] = settings.get("compute_dtype")
    changed = {n: v for n, v in settings.items() if v != defaults.get(n)}
    if not changed:
        return ["Settings: the defaults.", ""]
    listed = ", ".join(f"`{name}: {value}`" for name, value in sorted(changed.items()))
    paper = {**defaults, **PRESETS["paper"]}
    if settings == {name: paper.get(name) for name in settings}:
        listed += " (the preset `paper`)"
    return [f"Settings that differ from the defaults: {listed}.", ""]


def _calibration(record: Mapping[str, Any]) -> list[str]:
    calibration = record.get("calibration")
    if not calibration:
        return ["Coefficients: taken from a file, without calibration data.", ""]
    queries = calibration.get("queries") or {}
    counts = ", ".join(f"{count} {name}" for name, count in queries.items())
    return [
        f"Calibration file: {f'{counts} queries, ' if counts else ''}SHA-256 "
        f"`{calibration['digest']}`.",
        "",
    ]


def _routing(record: Mapping[str, Any]) -> list[str]:
    """Return what was measured of the merge without generating anything."""
    point = record.get("operating_point")
    if not point:
        return []
    if not point.get("held_out"):
        return [f"{summary(point).capitalize()}.", ""]
    scale = record.get("scale", point["scale"])
    moved = scale != point["scale"]
    of = f"the merge at scale {point['scale']:g}" if moved else "this merge"
    lines = [f"Measured by log-likelihoods: {of} {summary(point)}."]
    if moved:
        lines.append(
            f"This model is another: its coefficients are those solved times {scale:g} "
            f"(`reasoning: {record.get('reasoning')}`), and it was not measured."
        )
    else:
        if scale != 1:
            lines.append(f"The solved coefficients are multiplied by {scale:g}.")
        of_layers = record.get("layers") or []
        granularity = (record.get("settings") or {}).get("granularity")
        said = warnings(point, of_layers, granularity)
        lines += [f"Warning: {text}" for text in said]
    head, rows = table(point)
    return [*lines, "", *markdown_table(head, rows), "", f"{NOTE}.", ""]


def _layers(record: Mapping[str, Any]) -> list[str]:
    layers = record.get("layers") or []
    if not layers:
        return []
    names = ("divergence", "gap_before", "gap_after", "mean_coefficient")
    rows = [
        [
            str(layer["layer"]),
            *(_number(layer.get(name)) for name in names),
            "" if layer.get("optimised", True) else "not optimised",
        ]
        for layer in layers
    ]
    head = ["layer", *(name.replace("_", " ") for name in names), ""]
    return [
        "<details><summary>Layers</summary>",
        "",
        *markdown_table(head, rows),
        "",
        "Gap: squared distance to the model that each query should follow; 1 is the "
        "distance of the other model. Coefficient: share of the model that is not the "
        "base.",
        "",
        "</details>",
        "",
    ]


def _reproduce(record: Mapping[str, Any], recipe: str | None) -> list[str]:
    coefficients = record.get("coefficients") or {}
    path = coefficients.get("path") or "rpam/coefficients.safetensors"
    digest = coefficients.get("sha256", "")
    config = recipe or "mergekit_config.yml"
    how = (
        "needs neither calibration data nor a pre-pass: it reads the merging "
        if recipe
        else "repeats the merge. It needs neither calibration data nor a pre-pass if "
        "its `parameters` name, in place of `calibration`, the merging "
    )
    return [
        "To repeat the merge, with mergekit and rpam-mergekit installed:",
        "",
        "```sh",
        f"mergekit-yaml {config} out/",
        "```",
        "",
        f"`{config}` {how}`coefficients`: `{path}`, SHA-256 `{digest}`. `rpam.json` "
        "records models, settings and versions.",
        "",
    ]


def _comparison(table: str | None) -> list[str]:
    if not table:
        return []
    return ["#### Compared with its experts", "", table.strip(), ""]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "-"
