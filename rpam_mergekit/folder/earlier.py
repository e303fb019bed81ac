"""What lies in an output folder before a merge: whose it is, and what goes.

Of an earlier merge nothing may stay: transformers would load its `model.safetensors`
beside the shards of the new one, and `push` would publish what belongs to it. What no
merge made is nobody's to delete or to write over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import yaml
from mergekit.common import ModelReference
from mergekit.io import ShardedTensorIndex
from mergekit.options import MergeOptions

from rpam_mergekit.errors import RpamError, refuse
from rpam_mergekit.folder.base_files import MODEL, TOKENIZER, code_in, names_in
from rpam_mergekit.folder.contents import (
    CARD,
    CONFIG,
    IN_OUTPUT,
    RECORD,
    STOCK_RECIPE,
    read_record,
)
from rpam_mergekit.formats.coefficients import CoefficientsFile
from rpam_mergekit.models.adapters import merged_folder
from rpam_mergekit.models.headers import cached_folder
from rpam_mergekit.settings import NAME
from rpam_mergekit.text import listed

# Stands in a folder from when the earlier merge is taken away until the record.
MARKER = ".rpam.unfinished"
WEIGHTS = (
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
    "pytorch_model.bin.index.json",
)
# As we call files that are being written, and as safetensors does.
PARTIAL = (".*.partial", "rpam/*.partial")
TEMPORARY = ".tmp??????"
REPORT = ("rpam/report.html", "rpam/report.png")
ABOUT = (CARD, CONFIG, RECORD, STOCK_RECIPE)
# Loaded, or taken for weights, wherever they come from.
LOADED = ("*.safetensors", "*.bin", "*.index.json", "adapter_config.json")
MODELS = (*LOADED, "*.gguf", "*.pt", "*.pth", "*.ckpt")


def refuse_folder(
    out: Path, models: Iterable[ModelReference], options: MergeOptions
) -> None:
    """Raise `RpamError` if a merge of `models` must not be written to the folder `out`.

    It is that of an input, or has files that a merge would write over or that would
    be loaded with the merged model, and that no merge by `rpam` made.
    """
    findings = list(_of_inputs(out, models, options))
    if out.exists() and not out.is_dir():
        findings.append(f"OUT: {out} is a file. Name a folder.")
    if not findings and out.is_dir():
        findings += _of_others(out)
    refuse(findings)


def _of_inputs(
    out: Path, models: Iterable[ModelReference], options: MergeOptions
) -> Iterator[str]:
    for model in models:
        places = [Path(model.model.path)]
        if not places[0].is_dir():
            places = [p for p in (cached_folder(model),) if p is not None]
        if model.lora is not None:
            places.append(Path(model.lora.path))
            merged = merged_folder(model, options)
            places += [merged] if merged is not None else []
        if any(_same(out, folder) for place in places for folder in _holding(place)):
            yield (
                f"OUT: {out} is the folder of {model}, of which the merge is made, and "
                "would be written over. Name another folder."
            )


def _holding(place: Path) -> set[Path]:
    """Return a model's folder, and where its files lie if they are links."""
    found = {place}
    with suppress(Exception):  # no folder, or no model that mergekit reads
        shards = ShardedTensorIndex.from_disk(str(place)).tensor_paths.values()
        found |= {(place / shard).resolve().parent for shard in set(shards)}
    return found


def _same(one: Path, other: Path) -> bool:
    with suppress(OSError):
        return one.samefile(other)
    return False


def _of_others(out: Path) -> Iterator[str]:
    ours = is_ours(out)
    made = names_in(out, (*WEIGHTS, *MODEL, *TOKENIZER, *ABOUT))
    if ours:
        foreign = set(names_in(out, LOADED)) - {*made}
    else:
        foreign = {*names_in(out, MODELS), *made}
    several = sorted(name for name in foreign if not _holds_coefficients(out / name))
    if not several:
        return
    what = (
        "which the merged model would be loaded with, and which no merge made"
        if ours
        else f"but no {RECORD} of a merge by rpam: they may be somebody else's model"
    )
    yield (
        f"OUT: {out} holds {listed(several)}, {what}. Name another "
        "folder, or move them away."
    )


def _holds_coefficients(path: Path) -> bool:
    """Tell whether a file holds coefficients, which a config may put anywhere."""
    with suppress(RpamError, OSError):
        return path.suffix == ".safetensors" and bool(CoefficientsFile(path))
    return False


def is_ours(out: Path) -> bool:
    """Tell whether a folder holds a merge by `rpam`, or what one left that was killed.

    Versions before the marker left coefficients alone, or a folder without a record.
    """
    if (out / MARKER).exists():
        return True
    with suppress(RpamError):
        return bool(read_record(out).get("method") == NAME)
    with suppress(OSError, ValueError, AttributeError, yaml.YAMLError):
        text = (out / CONFIG).read_text("utf-8")
        return bool(yaml.safe_load(text).get("merge_method") == NAME)
    return (out / IN_OUTPUT).exists()


def clear(out: Path, keep_coefficients: bool) -> list[str]:
    """Take away what an earlier merge left in `out`, and mark the folder as unfinished.

    `keep_coefficients`: the file in the folder is that of the merge to come. What
    pre-passes with other settings have solved that did not end stays: they can go on.
    Returns the names of files that stay, and that no merge made.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text(
        json.dumps({"method": NAME, "unfinished": True}) + "\n", encoding="utf-8"
    )
    (out / RECORD).unlink(missing_ok=True)
    patterns = (*WEIGHTS, *MODEL, *TOKENIZER, *ABOUT, *PARTIAL, *REPORT)
    for name in [*code_in(out), *names_in(out, patterns)]:
        (out / name).unlink(missing_ok=True)
    for path in (*out.glob(TEMPORARY), *out.glob(f"rpam/{TEMPORARY}")):
        if _is_a_killed_writers(path):
            path.unlink()
    if not keep_coefficients:
        (out / IN_OUTPUT).unlink(missing_ok=True)
    with suppress(OSError):
        (out / "additional_chat_templates").rmdir()
    return [
        path.name
        for path in sorted(out.iterdir())
        if path.name != IN_OUTPUT.parts[0] and not path.name.startswith(".")
    ]


def _is_a_killed_writers(path: Path) -> bool:
    """Tell whether safetensors began a file that it was not let finish.

    It writes into a file of a random name and of full size: the length of the header,
    which is JSON, comes first.
    """
    if not path.is_file():
        return False
    with path.open("rb") as file:
        beginning = file.read(9)
    return beginning[8:] == b"{" or not any(beginning)


def finished(out: Path) -> None:
    """Take the mark of an unfinished merge away; the record is there."""
    (out / MARKER).unlink(missing_ok=True)
