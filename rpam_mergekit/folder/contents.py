"""What the output folder of a merge holds: record, weights, coefficients.

`RpamError` says what is missing or belongs to another merge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mergekit.io import ShardedTensorIndex
from safetensors import SafetensorError, safe_open

from rpam_mergekit.errors import RpamError, first_line, refuse
from rpam_mergekit.formats.files import digest_of_file
from rpam_mergekit.formats.hub_path import local_path
from rpam_mergekit.models.headers import unreadable

RECORD = "rpam.json"
IN_OUTPUT = Path("rpam") / "coefficients.safetensors"
COEFFICIENTS = IN_OUTPUT.as_posix()
CARD, RECIPE, CONFIG = "README.md", "rpam.yml", "mergekit_config.yml"
STOCK_RECIPE = "rpam_recipe.yml"


def read_record(out: str | Path) -> dict[str, Any]:
    """Return what `rpam.json` says of the merge in the folder `out`.

    Raises `RpamError` if there is no whole record.
    """
    out = Path(out)
    if not out.is_dir():
        raise RpamError(f"OUT: no folder {out}. Name the output folder of a merge.")
    try:
        record = json.loads((out / RECORD).read_text("utf-8"))
        return {**record, "coefficients": {**record["coefficients"]}}
    except FileNotFoundError:
        raise RpamError(
            f"OUT: {out} has no {RECORD}, which every merge by rpam writes when it has "
            "ended. Name the output folder of such a merge, or run the merge again."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RpamError(
            f"OUT: {out / RECORD} is not the record of a merge: {first_line(error)}. "
            "Run the merge again."
        ) from None


def weight_files(out: Path) -> set[str]:
    """Return the names of a model's shards and index.

    Raises `RpamError` if the model is not whole: no config, a shard that is missing,
    cut off, or without a tensor that the index says it has.
    """
    findings = []
    if not (out / "config.json").exists():
        findings.append(f"OUT: {out} has no config.json: it holds no whole model.")
    reason = unreadable(out)
    if reason:
        findings.append(f"OUT: the model in {out} is not whole: {reason}")
    refuse([f"{finding} Run the merge again." for finding in findings])
    tensors = ShardedTensorIndex.from_disk(str(out)).tensor_paths
    shards = set(tensors.values())
    for shard in sorted(s for s in shards if s.endswith(".safetensors")):
        try:
            with safe_open(out / shard, framework="pt") as file:
                lacking = {n for n, s in tensors.items() if s == shard} - {*file.keys()}
        except (OSError, SafetensorError) as error:
            findings.append(f"{shard} cannot be read: {first_line(error)}")
            continue
        if lacking:
            findings.append(f"{shard} has no tensor {sorted(lacking)[0]}")
    refuse([f"OUT: {finding}. Run the merge again." for finding in findings])
    index = {f.name for f in out.glob("*.index.json") if _of(f, shards)}
    return shards | index


def weight_digests(out: Path) -> dict[str, str]:
    """Return the SHA-256 of a model's shards and index, by name."""
    names = sorted(weight_files(out))
    with ThreadPoolExecutor() as pool:
        found = pool.map(digest_of_file, [out / name for name in names])
        return dict(zip(names, found, strict=True))


def check_weights(out: Path, record: Mapping[str, Any]) -> list[str]:
    """Return notes on a model's weights; raise `RpamError` if they are not the merge's.

    Records of before do not know them.
    """
    known: Mapping[str, str] | None = record.get("weights")
    if known is None:
        return [
            f"{RECORD} is of an earlier version and has no digests of the weights: "
            "whether they are those that the merge wrote is not known"
        ]
    found = weight_digests(out)
    others = sorted(n for n in {*known, *found} if known.get(n) != found.get(n))
    if not others:
        return []
    raise RpamError(
        f"OUT: the weights in {out} are not those that the merge wrote: the SHA-256 of "
        f"{', '.join(others)} {'is' if len(others) == 1 else 'are'} not in {RECORD}. "
        "Put the merge's own files back, or run the merge again."
    )


def _of(index: Path, shards: set[str]) -> bool:
    """Tell whether an index file is that of `shards`."""
    named = set(json.loads(index.read_text("utf-8")).get("weight_map", {}).values())
    return named == shards


def find_coefficients(
    out: Path, record: Mapping[str, Any], given: str | None = None
) -> Path:
    """Return the coefficients file of a merge: the one `given`, or that in `out`.

    Or the one that the record names. Raises `RpamError` if it is another merge's.
    """
    known, key = record["coefficients"], "--coefficients"
    path = out / COEFFICIENTS
    if given is not None or not path.exists():
        named = given or known.get("path") or str(path)
        path = local_path(named, key)
    if not path.is_file():
        raise RpamError(f"{key}: no file {path}. Name the merge's coefficients file.")
    digest = digest_of_file(path)
    if digest != known["sha256"]:
        raise RpamError(
            f"{key}: {path} is not the file by which {out} was merged: its "
            f"SHA-256 is {digest}, that in {RECORD} {known['sha256']}. "
            "Name that file, or run the merge again."
        )
    return path


def read_comparison(path: Path | None) -> str | None:
    """Return the tables that `mergekit-rpam compare` wrote, in Markdown."""
    if path is None:
        return None
    file = path / "compare.md" if path.is_dir() else path
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RpamError(
            f"--comparison: {file} cannot be read: {first_line(error)}. Name the "
            "folder that 'mergekit-rpam compare' wrote with --out, or its compare.md."
        ) from None
    if not text.startswith("queries: ") or "<!--" in text:
        raise RpamError(
            f"--comparison: {file} is not a compare.md of 'mergekit-rpam compare'. "
            "Name the one it wrote."
        )
    return text
