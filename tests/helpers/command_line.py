"""The options of `mergekit-rpam`, as tables for docs/command-line.md.

`python tests/helpers/command_line.py` prints them; a test holds the page to them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import click

from rpam_mergekit.cli.main import main

SHARED = "Options of several commands"
# Commands that take all of mergekit's options; `merge` takes no others.
OF_MERGEKIT = ("check", "fit", "export", "merge")


def options_of(name: str) -> list[click.Option]:
    """Return a command's own options: none of mergekit's."""
    context = click.Context(main)
    commands = {of: main.get_command(context, of) for of in (name, "merge")}
    assert all(commands.values())
    of_mergekit = {option.name for option in commands["merge"].params}
    return [
        option
        for option in commands[name].params
        if isinstance(option, click.Option)
        and not (name in OF_MERGEKIT and option.name in of_mergekit)
    ]


def tables() -> dict[str, str]:
    """Return the options as Markdown tables, by command; of `SHARED` those of many."""
    names = main.list_commands(click.Context(main))
    of_commands = {name: options_of(name) for name in names}
    options = [option for own in of_commands.values() for option in own]
    counts = Counter((option.name, option.help) for option in options)
    shared = {o.name: o for o in options if counts[o.name, o.help] > 2 and o.help}
    found = {
        name: [o for o in own if o.name not in shared or o.help != shared[o.name].help]
        for name, own in of_commands.items()
    }
    found[SHARED] = list(shared.values())
    return {name: _table(own) for name, own in found.items() if own}


def _table(options: Iterable[click.Option]) -> str:
    lines = ["| option | default | |", "|---|---|---|"]
    for option in options:
        default = ""
        if option.required:
            default = "required"
        elif option.show_default is True and not option.is_flag:
            default = f"`{option.default}`"
        text = (option.help or "").replace("|", r"\|").replace("<", "&lt;")
        lines.append(f"| `{_names(option)}` | {default} | {text} |")
    return "\n".join(lines)


def _names(option: click.Option) -> str:
    """Return how an option is written, with what follows it."""
    names = ", ".join(option.opts)
    if option.secondary_opts:
        names = f"{names} / {', '.join(option.secondary_opts)}"
    if option.is_flag:
        return names
    if isinstance(option.type, click.Choice):
        choices = r"\|".join(option.type.choices)
        return f"{names} {choices}"
    if option.metavar:
        return f"{names} {option.metavar}"
    kinds = {"integer": "N", "float": "NUMBER", "text": "TEXT", "file": "FILE"}
    kinds |= {"directory": "FOLDER", "path": "PATH"}
    return f"{names} {kinds[option.type.name.removesuffix(' range')]}"


if __name__ == "__main__":
    for name, table in tables().items():
        print(f"## {name}\n\n{table}\n")
