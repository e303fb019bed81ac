"""The command `mergekit-rpam`."""

from __future__ import annotations

import click

from rpam_mergekit import __version__
from rpam_mergekit.method import activate

activate()
# After `activate`: it takes the name `run_merge` from mergekit when it is imported.
from mergekit.scripts.run_yaml import main as mergekit_yaml  # noqa: E402


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Merge a Long-CoT and a Short-CoT model into one that reasons adaptively."""


main.add_command(mergekit_yaml, "merge")
mergekit_yaml.help = """Run the merge that CONFIG_FILE describes into OUT_PATH.

This is mergekit-yaml with all its options, with the method 'rpam' registered: the
route that needs no start-up file.
"""

if __name__ == "__main__":
    main()
