"""The text of a config: is it YAML, and are all its keys and values mergekit's?

mergekit ignores keys that it does not know, and of a key that is given twice all but
the last. What it takes is read from its own pydantic classes.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from mergekit.config import MergeConfiguration
from pydantic import BaseModel, ValidationError

from rpam_mergekit.checks.request import belongs
from rpam_mergekit.errors import RpamError, first_line, refuse, suggestion

# What pydantic's error types say, in words; the rest are taken from its messages.
EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "literal_error": "",
}
CLASSES = {
    "ModelReference": "the name of a model",
    "ConditionalParameter": "filters with values",
}
ONE_OF = ("models", "slices", "modules")
LONGEST = 60


@dataclass(frozen=True)
class Document:
    """One config of a file: its content, what it means to mergekit, what is wrong.

    `name` is mergekit-multi's. `config` is None where mergekit could not read it.
    path, text: of the whole file. lines: where every key and item stands in it, by its
    place in the config, such as ``models[0].model``.
    """

    content: Mapping[str, Any]
    config: MergeConfiguration | None = None
    findings: list[str] = field(default_factory=list)
    name: str | None = None
    path: str = ""
    text: str = ""
    lines: Mapping[str, int] = field(default_factory=dict)

    def located(self, findings: Sequence[str]) -> list[str]:
        """Return findings with file and line before those that name a place in it."""
        return [self._located(finding) for finding in findings]

    def _located(self, finding: str) -> str:
        place, _, rest = finding.partition(": ")
        top = not place.isidentifier() or not rest.startswith("missing")
        for where, text in _strings(self.content):  # what is said of a model
            if where.endswith("model") and finding.startswith(f"{text}: "):
                place = where
                break
        while place and place not in self.lines:
            place = place[: max(place.rfind("."), place.rfind("["), 0)]
        if not place and (top or not self.lines):
            return finding
        line = self.lines[place] if place else min(self.lines.values())
        return f"{self.path}:{line}: {finding}"


def read_one(path: str | Path) -> Document:
    """Return the one config of a file; what is wrong with it is in `findings`.

    Raises `RpamError` if the file cannot be read, is no YAML, or has several configs.
    """
    documents = read_documents(path)
    if len(documents) > 1:
        raise RpamError(
            f"{path}: there are {len(documents)} configs in it, expected one. "
            "mergekit-multi merges several."
        )
    return documents[0]


def read_config(path: str | Path) -> Document:
    """Return the one config of a file, which mergekit can read.

    Raises `RpamError` with file and line for all that is wrong with it as YAML and as
    a config of mergekit, and where there are several.
    """
    document = read_one(path)
    refuse(
        [
            finding if finding.startswith(f"{path}:") else f"{path}: {finding}"
            for finding in document.located(document.findings)
        ]
    )
    return document


def read_documents(path: str | Path) -> list[Document]:
    """Return the configs of a file, of which mergekit-multi's have several.

    Raises `RpamError` if it cannot be read, is not UTF-8, no YAML or empty.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        nodes = list(yaml.compose_all(text, yaml.SafeLoader))
        contents = list(yaml.safe_load_all(text))
    except OSError as error:
        raise RpamError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RpamError(f"{path}:{line}: not UTF-8 text: {error.reason}.") from error
    except yaml.YAMLError as error:
        raise RpamError(f"{path}{_place(error)}") from error
    except ValueError as error:  # such as a date that does not exist
        raise RpamError(f"{path}: not YAML: {first_line(error)}") from error
    found = [
        replace(
            _document(content, list(_repeated(node, "")), f"{path}:{_line(node)}"),
            path=str(path),
            text=text,
            lines=dict(_places(node, "")),
        )
        for content, node in zip(contents, nodes, strict=True)
        if content is not None
    ]
    if not found:
        raise RpamError(
            f"{path}:1: there is no config in it. A config has merge_method, "
            "base_model, models and parameters."
        )
    return found


def document_of(content: Mapping[str, Any]) -> Document:
    """Return a config that is no file; what is wrong with it is in `findings`."""
    content = _plain(content)
    document = _document(content, [], "the config")
    try:
        text = yaml.safe_dump(dict(content), sort_keys=False)
    except yaml.YAMLError as error:
        raise RpamError(f"the config: not YAML: {first_line(error)}") from error
    return replace(document, text=text)


def _plain(value: Any) -> Any:
    """Return a config with texts for paths, and plain mappings and lists."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value


def check_keys(document: Any) -> list[str]:
    """Return a finding for every unknown key of a config, with a suggestion."""
    if not isinstance(document, Mapping):
        return []
    known = {key: value for key, value in document.items() if key != "name"}
    return list(_unknown(known, [MergeConfiguration], ""))


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or first_line(error)
    where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
    advice = " Indent by spaces." if "'\\t'" in problem else ""
    return f"{where}: not YAML: {problem}.{advice}"


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _places(node: yaml.Node, where: str) -> Iterator[tuple[str, int]]:
    """Yield the place of every key and item of a YAML tree, and its line."""
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield f"{where}[{number}]", _line(item)
            yield from _places(item, f"{where}[{number}]")
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{where}.{key.value}".removeprefix(".")
            yield path, _line(key)
            yield from _places(value, path)


def _document(content: Any, findings: list[str], where: str) -> Document:
    if not isinstance(content, Mapping):
        raise RpamError(
            f"{where}: the config is {_shown(content)}, expected a mapping with "
            "merge_method, base_model, models and parameters."
        )
    name = content.get("name")
    content = {key: value for key, value in content.items() if key != "name"}
    findings += check_keys(content)
    try:
        config = MergeConfiguration.model_validate(content)
    except ValidationError as error:
        findings += _invalid(error, content)
        return Document(content, None, findings, name)
    except RuntimeError as error:  # of mergekit's validators
        findings.append(_refused(error, content))
        return Document(content, None, findings, name)
    return Document(content, config, findings, name)


def _repeated(node: Any, where: str) -> Iterator[str]:
    """Yield a finding for every key that a mapping of a YAML tree has twice."""
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _repeated(item, f"{where}[{number}]")
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            path = f"{where}.{key.value}".removeprefix(".")
            line = key.start_mark.line + 1
            if isinstance(key.value, str) and key.value in lines:
                yield (
                    f"{path}: given twice, in lines {lines[key.value]} and {line}. "
                    "Only the last would count."
                )
            lines[str(key.value)] = line
            yield from _repeated(value, path)


def _unknown(value: Any, annotations: Sequence[Any], where: str) -> Iterator[str]:
    """Yield a finding for every key that none of the `annotations` knows."""
    arms = [arm for annotation in annotations for arm in _arms(annotation)]
    if isinstance(value, (list, tuple)):
        items = [
            a for arm in arms if get_origin(arm) in (list, tuple) for a in _of(arm)
        ]
        for number, item in enumerate(value):
            yield from _unknown(item, items, f"{where}[{number}]")
    if not isinstance(value, Mapping):
        return
    fields: dict[str, list[Any]] = {}
    for arm in arms:
        if isinstance(arm, type) and issubclass(arm, BaseModel):
            for name, info in arm.model_fields.items():
                fields.setdefault(name, []).append(info.annotation)
    values = [_of(arm)[1] for arm in arms if get_origin(arm) is dict]
    for key, inner in value.items():
        path = f"{where}.{key}".removeprefix(".")
        if values or key in fields:
            yield from _unknown(inner, values + fields.get(key, []), path)
        elif fields:
            hint = belongs(str(key), where) or suggestion(str(key), fields)
            yield f"{path}: unknown key.{hint}"


def _arms(annotation: Any) -> list[Any]:
    """Return what an annotation allows, its unions flattened."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [arm for one in get_args(annotation) for arm in _arms(one)]
    return [annotation]


def _of(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation)


def _invalid(error: ValidationError, content: Mapping[str, Any]) -> list[str]:
    """Return one finding for every value that mergekit cannot read."""
    found: dict[str, list[Any]] = {}
    values: dict[str, Any] = {}
    for one in error.errors():
        where, value = _located(one, content)
        found.setdefault(where, []).append(one)
        values[where] = value
    # A union reports what each of its arms would have needed inside the value.
    outer = [w for w in found if not any(e["type"] == "missing" for e in found[w])]
    findings = []
    for where, errors in found.items():
        if any(where.startswith((f"{o}.", f"{o}[")) for o in outer):
            continue
        if where not in outer:
            findings.append(f"{where}: missing.")
        else:
            findings.append(f"{where}: found {_shown(values[where])}.{_said(errors)}")
    return findings


def _located(error: Any, content: Any) -> tuple[str, Any]:
    """Return the path of the value that an error is about, and the value.

    pydantic's own path has the names of a union's arms in it.
    """
    where, value = "", content
    for part in error["loc"]:
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            where, value = f"{where}[{part}]", value[part]
        elif isinstance(value, Mapping) and part in value:
            where, value = f"{where}.{part}", value[part]
    if error["type"] == "missing":
        where = f"{where}.{error['loc'][-1]}"
    return where.removeprefix("."), value


def _said(errors: Sequence[Any]) -> str:
    expected, messages = [], []
    for error in errors:
        word = EXPECTED.get(error["type"])
        if error["type"] in ("model_type", "model_attributes_type"):
            word = CLASSES.get(error["ctx"]["class_name"], "a mapping")
        elif error["type"] == "literal_error":
            word = error["ctx"]["expected"]
        if word:
            expected.append(word)
        else:
            messages.append(error["msg"].removeprefix("Value error, "))
    told = [f" {message.rstrip('.')}." for message in dict.fromkeys(messages)]
    if expected:
        told.insert(0, f" Expected {' or '.join(dict.fromkeys(expected))}.")
    return "".join(told)


def _refused(error: RuntimeError, content: Mapping[str, Any]) -> str:
    """Return a finding for what mergekit's validators refuse without a place."""
    said = first_line(error)
    if "Exactly one of" in said:
        given = [key for key in ONE_OF if content.get(key)]
        found = " and ".join(given) if given else "none of them"
        return f"{', '.join(ONE_OF)}: found {found}, expected exactly one. {_EXAMPLE}"
    for where, text in _strings(content):
        if text and said.endswith(text):
            return f"{where}: found '{text}'. {said.removesuffix(text).rstrip(': ')}."
    return f"{said}."


_EXAMPLE = "Write models: with the model that is not base_model."


def _strings(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the value of all strings in a config."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(inner, f"{where}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _strings(inner, f"{where}[{number}]")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a mapping of {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    shown = "nothing" if value is None else repr(value)
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."
