"""The commands take the very options that the installed mergekit's commands take."""

from __future__ import annotations

import functools

import click
import pytest
from click.testing import CliRunner
from mergekit.options import (
    OPTION_CATEGORIES,
    MergeOptions,
    add_merge_options,
)
from mergekit.scripts.run_yaml import main as mergekit_yaml

from rpam_mergekit.cli import mergekit_options as ours
from rpam_mergekit.cli.main import main
from rpam_mergekit.errors import RpamError

NAMES = list(MergeOptions.model_fields)
COMMANDS = ("check", "fit", "merge", "export")


@click.command()
@ours.mergekit_options
def with_ours(merge_options: MergeOptions) -> None:
    click.echo(merge_options.model_dump_json())


@click.command()
@add_merge_options
def with_mergekits(merge_options: MergeOptions) -> None:
    click.echo(merge_options.model_dump_json())


def described(command: click.Command, name: str) -> dict[str, object]:
    """Return what makes an option of a command another one."""
    (option,) = (p for p in command.params if p.name == name)
    assert isinstance(option, click.Option)
    return {
        "forms": sorted([*option.opts, *option.secondary_opts]),
        "off": option.secondary_opts,
        "type": option.type.name,
        "default": option.default,
        "shows its default": option.show_default,
        "is a flag": option.is_flag,
        "counts": option.count,
        "several": option.multiple or option.nargs != 1,
        "required": option.required,
    }


def test_there_are_the_same_options_in_the_same_order():
    missing = [name for name in NAMES if name not in ours.GROUPS]
    extra = [name for name in ours.GROUPS if name not in NAMES]
    assert not missing, f"mergekit's options that cli/mergekit_options lacks: {missing}"
    assert not extra, f"options that mergekit does not have (any longer): {extra}"
    assert list(ours.GROUPS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_option_is_mergekits(name):
    found, expected = described(with_ours, name), described(with_mergekits, name)
    other = {key: (found[key], expected[key]) for key in expected}
    other = {key: pair for key, pair in other.items() if pair[0] != pair[1]}
    assert not other, f"--{name}, ours against mergekit's: {other}"
    field = MergeOptions.model_fields[name]
    assert found["default"] == field.default, f"--{name}: the field's default"
    assert ours.GROUPS[name].lower() == OPTION_CATEGORIES[name].lower()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_on_configs_has_them_all(command):
    found = main.commands[command]
    for name in NAMES:
        assert described(found, name) == described(mergekit_yaml, name)


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--cuda",
        "--device auto",
        "--gpu-rich --no-copy-tokenizer",
        "-vv -j 3 --random-seed 7 --quiet",
        "--out-shard-size 500M --transformers-cache x --lora-merge-dtype float16",
        "--out-shard-size 2k --async-write --write-threads 4 --low-cpu-memory",
        "--out-shard-size 12345 --no-write-model-card --unsafe-truncate-embeddings",
    ],
)
def test_they_mean_the_same(arguments):
    results = [
        CliRunner().invoke(command, arguments.split())
        for command in (with_ours, with_mergekits)
    ]
    assert results[0].exit_code == 0, results[0].output
    assert results[0].output == results[1].output


@pytest.mark.parametrize("size", ["", "B", "5 apples", "1.5B"])
def test_a_size_that_is_none_is_a_usage_error(size):
    result = CliRunner().invoke(with_ours, ["--out-shard-size", size])
    assert result.exit_code == 2
    assert "expected one such as 500M or 5B" in result.output


def test_an_option_that_mergekit_no_longer_has_is_refused():
    with pytest.raises(
        RpamError, match=r"--old-flag, --older: mergekit .* has no such"
    ):
        ours.make_merge_options({"old_flag": True, "older": 1, "cuda": False})


def test_an_option_of_a_newer_mergekit_is_told_from_a_slip(monkeypatch):
    invoke = functools.partial(CliRunner().invoke, main)
    command = ["check", "rpam.yml", "--newest"]
    assert "is installed" not in invoke(command).output
    monkeypatch.setattr(ours, "MERGEKIT", "0.1.4")
    result = invoke(command)
    assert result.exit_code == 2
    assert "--newest" in result.output
    assert "this command knows the options of mergekit 0.1.4" in result.output
