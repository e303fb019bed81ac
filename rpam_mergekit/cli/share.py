"""The commands that share a merge: `export` as a stock recipe, `push` on the Hub."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rpam_mergekit.cli.mergekit_options import MergekitCommand, mergekit_options
from rpam_mergekit.cli.options import interruptible
from rpam_mergekit.errors import RpamError

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from rpam_mergekit.outputs.publish import Plan, Request
    from rpam_mergekit.outputs.repository import Target


# mergekit's options that a merge by the recipe needs as the export did.
PASSED_ON = (
    "transformers_cache",
    "lora_merge_cache",
    "lora_merge_dtype",
    "trust_remote_code",
)


@click.command(
    "export",
    cls=MergekitCommand,
    short_help="Write a merge as a recipe that needs no plugin.",
)
@click.argument("config_file", type=click.Path())
@click.argument("coefficients")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The recipe to write. [default: rpam_recipe.yml beside the coefficients file; "
    "here, if that is of the Hub]",
)
@mergekit_options
def export_command(
    merge_options: MergeOptions,
    config_file: str,
    coefficients: str,
    out: Path | None,
) -> None:
    """Write the merge by CONFIG_FILE and COEFFICIENTS as a stock mergekit recipe.

    COEFFICIENTS is the merge's coefficients file, or its output folder. The recipe
    merges without this package, to the same bytes, where there is one coefficient
    per tensor: with the granularities layer, module and tensor.

    \b
      mergekit-rpam export rpam.yml out/rpam/coefficients.safetensors
      mergekit-yaml out/rpam/rpam_recipe.yml merged/
    """
    from rpam_mergekit.api import export

    path = export(config_file, coefficients, out, **merge_options.model_dump())
    if not merge_options.quiet:
        command = ["mergekit-yaml", str(path), "OUT", *_passed_on(merge_options)]
        click.echo(
            f"rpam: the recipe merges without this package: {shlex.join(command)}",
            err=True,
        )
    click.echo(str(path))


def _passed_on(options: MergeOptions) -> list[str]:
    """Return the options of this export that a merge by the recipe needs too."""
    found = []
    for name in PASSED_ON:
        value = getattr(options, name)
        if value:
            found.append("--" + name.replace("_", "-"))
            found += [] if value is True else [str(value)]
    return found


@click.command("push", short_help="Publish a merge on the Hub.")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repository", metavar="REPO")
@click.option("--upload", is_flag=True, help="Do it. Without, only say what would be.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option(
    "--revision", metavar="BRANCH", help="Branch to publish on. [default: main]"
)
@click.option("--message", help="Message of the commit.")
@click.option(
    "--without-weights",
    is_flag=True,
    help="Publish only the recipe: rpam.yml, coefficients, record and card.",
)
@click.option(
    "--coefficients",
    metavar="FILE",
    help="The merge's coefficients file. [default: the one in OUT, "
    "or that in rpam.json]",
)
@click.option(
    "--comparison",
    type=click.Path(path_type=Path),
    help="Tables for the card: the folder that 'compare' wrote, or its compare.md.",
)
@click.option(
    "--model",
    "named",
    multiple=True,
    metavar="LOCAL=NAME",
    help="Hub name of a model that the config names by a local folder; repeatable.",
)
def push_command(
    out: Path,
    repository: str,
    upload: bool,
    private: bool,
    revision: str | None,
    message: str | None,
    without_weights: bool,
    coefficients: str | None,
    comparison: Path | None,
    named: tuple[str, ...],
) -> None:
    """Publish the merge in folder OUT as the Hub model REPO (owner/name).

    Shows every file that would go up and what would change in the model card; nothing
    is sent without --upload. The model goes with its coefficients, its record and a
    config by which others repeat the merge.

    \b
      mergekit-rpam push out/ owner/name --comparison report/
      mergekit-rpam push out/ owner/name --comparison report/ --upload
    """
    with interruptible(Path(repository)):
        from rpam_mergekit.merging.hooks import activate
        from rpam_mergekit.outputs.publish import Request

        activate()
        request = Request(
            out=out,
            repository=_checked(repository),
            revision=revision,
            weights=not without_weights,
            coefficients=coefficients,
            comparison=comparison,
            named=_named(named),
        )
        _push(request, upload, private, message)


def _push(request: Request, upload: bool, private: bool, message: str | None) -> None:
    import tempfile  # not at the top: help comes at once

    from rpam_mergekit.outputs import publish, repository

    with tempfile.TemporaryDirectory() as scratch:
        plan = publish.make_plan(request, Path(scratch))
        target = repository.look(request, plan, private)
        click.echo("\n".join(_shown(request, plan, target)))
        if not upload:
            for objection in target.objections:
                click.echo(f"--upload would be refused: {objection}")
            click.echo("nothing was sent; --upload does it")
            return
        repository.refuse_objections(target)
        message = message or f"Merge by rpam-mergekit: {len(plan.files)} files"
        address = repository.upload(request, plan, private, message)
        click.echo(f"published: {address}")


def _checked(repository: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        if repository.count("/") == 1:
            return repository
    except HFValidationError:
        pass
    raise RpamError(f"REPO: found '{repository}', expected owner/name.")


def _named(given: tuple[str, ...]) -> dict[str, str]:
    """Return the options LOCAL=NAME as a mapping."""
    pairs = [one.rpartition("=") for one in given]
    for local, _, name in pairs:
        if not local or not name:
            raise RpamError(
                f"--model: found '{local}{name}', expected LOCAL=owner/name."
            )
    return {local: name for local, _, name in pairs}


def _shown(request: Request, plan: Plan, target: Target) -> list[str]:
    """Return what is published, and where, as lines."""
    import difflib

    from huggingface_hub import constants

    from rpam_mergekit.prepass.memory import readable

    state = {True: "private" if target.private else "public", False: "new", None: "?"}
    sizes = {name: readable(path.stat().st_size) for name, path in plan.files.items()}
    sizes["total"] = readable(plan.size)
    branch = request.revision or constants.DEFAULT_REVISION
    where = f"{constants.ENDPOINT}/{request.repository} ({state[target.exists]})"
    lines = [
        f"to {where}, branch {branch}:",
        *(f"  {size:>10}  {name}" for name, size in sizes.items()),
    ]
    if plan.left_out:
        lines.append("left out:")
        lines += [f"  {name}: {reason}" for name, reason in plan.left_out.items()]
    before, after = (text.splitlines() for text in plan.card)
    changes = list(difflib.unified_diff(before, after, n=1, lineterm=""))[2:]
    lines += ["README.md changes:" if changes else "README.md stays as it is"]
    lines += [f"  {line}" for line in changes]
    return [*lines, *(f"note: {note}" for note in [*target.notes, *plan.notes])]
