"""Shared by the tests of exported recipes: merges and exports in this process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mergekit.merge
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers.utils import logging

from helpers.merged import COEFFICIENTS, shard_bytes
from helpers.models import merge_config, qwen2_config, save_pair, write_calibration
from rpam_mergekit.cli.main import main
from rpam_mergekit.folder.contents import STOCK_RECIPE as RECIPE
from rpam_mergekit.merging import hooks


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what transformers reports of tiny models."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        LoaderCache.loaders.clear()
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def config_of(folder: Path, granularity: str = "module", **changes) -> dict:
    """Return the quickest config for the pair in `folder`; make its calibration."""
    write_calibration(folder / "calibration.jsonl", count=6)
    settings = {"epochs": 1, "batch_size": 3, "rank": 2, "granularity": granularity}
    settings |= changes.pop("parameters", {})
    return merge_config(folder, parameters=settings, **changes)


def merge(config: dict, out: Path, **options) -> Path:
    """Merge in this process, by mergekit's own planner and writer."""
    hooks.activate()
    LoaderCache.loaders.clear()
    mergekit.merge.run_merge(
        MergeConfiguration.model_validate(config),
        str(out),
        MergeOptions(quiet=True, write_model_card=False, **options),
    )
    return out


def exported(config: dict, out: Path, *options: str):
    """Return the outcome of `export` for the merge in `out`, quiet."""
    hooks.activate()
    LoaderCache.loaders.clear()
    path = out.with_suffix(".yml")
    path.write_text(yaml.safe_dump(config))
    command = [str(path), str(out / COEFFICIENTS), *options]
    return CliRunner().invoke(main, ["export", *command])


def recipe(config: dict, out: Path, *options: str) -> dict:
    """Return what `export` writes for the merge in `out`."""
    result = exported(config, out, *options)
    assert result.exit_code == 0, result.output
    return yaml.safe_load((out / COEFFICIENTS).with_name(RECIPE).read_text())


def refusal(config: dict, out: Path, *options: str) -> str:
    result = exported(config, out, *options)
    assert result.exit_code == 1, result.output
    assert result.output.startswith("rpam: ")
    return result.output


def comments(out: Path) -> dict:
    """Return what the comments of an exported recipe say."""
    text = (out / COEFFICIENTS).with_name(RECIPE).read_text()
    return yaml.safe_load("\n".join(re.findall(r"^#(.*)$", text, re.MULTILINE)))


def assert_same_bytes(
    config: dict, folder: Path, untied: bool = False, **options
) -> dict:
    """Merge by rpam, export, merge by the recipe: the same files. Return the recipe.

    untied: the head is not that of the base, which mergekit leaves tied in the config.
    """
    ours = merge(config, folder / "ours", **options)
    found = recipe(config, ours)
    assert found["merge_method"] == "task_arithmetic"
    plain = merge(found, folder / "plain", **options)
    names = sorted(path.name for path in plain.glob("model*"))
    assert names == sorted(path.name for path in ours.glob("model*"))
    assert shard_bytes(plain) == shard_bytes(ours)
    written = (plain / "config.json").read_text()
    if untied:
        tied = '"tie_word_embeddings": true'
        assert tied in written
        written = written.replace(tied, '"tie_word_embeddings": false')
    assert (ours / "config.json").read_text() == written
    return found


def finer_merge(folder: Path, tokenizer) -> Path:
    """Make a pair in `folder`, and its merge by low-rank fields in `out`."""
    with quiet():
        save_pair(folder, qwen2_config(tokenizer), tokenizer)
        merge(config_of(folder, "low_rank"), folder / "out")
    return folder
