"""mergekit's own options, declared without mergekit.

mergekit makes its command line options from its `MergeOptions`, whose import takes
seconds: torch and transformers come with it. The commands here list the same options
as plain click options, so that help and usage errors come at once, and make a
`MergeOptions` of them when the command runs. A test compares the list with the
installed mergekit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from rpam_mergekit.errors import RpamError

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

MERGEKIT = "0.1.5"  # the mergekit whose options these are
UNITS = {"k": 10**3, "m": 10**6, "b": 10**9}
OWN = "Options of this command"
OUTPUT, STORAGE = "Output settings", "Storage"
PERFORMANCE, DANGEROUS, OTHER = "Performance", "Dangerous options", "Miscellaneous"

R = TypeVar("R")


def size(value: int | str) -> int:
    """Return a number that may be written in thousands, millions, billions: 500M, 5B.

    Raises a usage error for anything else.
    """
    if isinstance(value, int):
        return value
    factor = UNITS.get(value[-1:].lower())
    try:
        return int(value) if factor is None else int(value[:-1]) * factor
    except ValueError:
        raise click.BadParameter(
            f"'{value}' is no number; expected one such as 500M or 5B."
        ) from None


@dataclass(frozen=True)
class Option:
    """One of mergekit's options.

    name: the field of `MergeOptions`. type: None for a flag that has an opposite.
    forms: how the option is written, where that is not `--name`. shown: whether the
    help shows the default. settings: what else click is to be told.
    """

    name: str
    group: str
    help: str
    default: bool | int | str | None = False
    type: click.ParamType[Any] | Callable[[Any], Any] | None = None
    forms: tuple[str, ...] = ()
    shown: bool = True
    settings: tuple[tuple[str, Any], ...] = ()

    def declare(self) -> Callable[[Callable[..., R]], Callable[..., R]]:
        """Return the decorator that gives a command this option."""
        written = "--" + self.name.replace("_", "-")
        usual = f"{written}/--no-{written[2:]}" if self.type is None else written
        return click.option(
            *(self.forms or (usual,)),
            type=self.type or click.BOOL,
            default=self.default,
            show_default=self.shown,
            help=self.help,
            **dict(self.settings),
        )


def _text(name: str, group: str, help: str) -> Option:
    return Option(name, group, help, None, click.STRING)


# In the order of the fields of `MergeOptions`.
OPTIONS = (
    Option("allow_crimes", DANGEROUS, "Merge models of different architectures."),
    Option(
        "unsafe_truncate_embeddings",
        DANGEROUS,
        "UNSAFE: cut embeddings to the smallest vocabulary of the models. Right only "
        "if equal token ids mean equal tokens; set 'tokenizer' in the config instead.",
    ),
    _text("transformers_cache", STORAGE, "Folder that models are downloaded to."),
    _text(
        "lora_merge_cache",
        STORAGE,
        "Folder for models with a LoRA adapter merged into them.",
    ),
    _text("lora_merge_dtype", OTHER, "Data type in which LoRA adapters are merged."),
    Option("cuda", PERFORMANCE, "Compute on the GPU."),
    _text("device", PERFORMANCE, "Compute on this device, such as cuda:1, or auto."),
    Option(
        "low_cpu_memory",
        PERFORMANCE,
        "Keep results on the GPU; for machines with more GPU memory than memory.",
    ),
    Option(
        "out_shard_size",
        OUTPUT,
        "Most parameters in one file of weights.  [default: 5B]",
        5 * UNITS["b"],
        size,
        shown=False,
    ),
    Option("copy_tokenizer", OUTPUT, "Write a tokenizer beside the model.", True),
    Option(
        "clone_tensors",
        OUTPUT,
        "Copy tensors before they are written, so that a layer may be there twice.",
    ),
    Option(
        "trust_remote_code",
        DANGEROUS,
        "Run Python code that comes with models from the Hub.",
    ),
    Option(
        "random_seed",
        OTHER,
        "Seed of merge methods that draw random numbers.",
        None,
        click.INT,
    ),
    Option(
        "lazy_unpickle",
        PERFORMANCE,
        "Read pickled weights tensor by tensor, in less memory. Experimental.",
    ),
    Option("write_model_card", OUTPUT, "Write README.md, the model card.", True),
    Option(
        "safe_serialization",
        OUTPUT,
        "Write the weights as safetensors; otherwise pickled.",
        True,
    ),
    Option(
        "verbosity",
        OTHER,
        "Log more; -vv still more.",
        0,
        click.INT,
        ("-v", "verbosity"),
        shown=False,
        settings=(("count", True),),
    ),
    Option("quiet", OTHER, "Show no progress, and little else."),
    Option("read_to_gpu", PERFORMANCE, "Read the weights straight into the GPU."),
    Option("multi_gpu", PERFORMANCE, "Merge on several GPUs at once."),
    Option(
        "num_threads",
        PERFORMANCE,
        "Threads that compute on the CPU.",
        None,
        click.INT,
        ("--num-threads", "-j"),
    ),
    Option(
        "gpu_rich",
        PERFORMANCE,
        "The same as --cuda --low-cpu-memory --read-to-gpu --multi-gpu.",
        forms=("--gpu-rich",),
        settings=(("is_flag", True),),
    ),
    Option(
        "async_write",
        PERFORMANCE,
        "Write files while the merge goes on: faster, in more memory.",
    ),
    Option("write_threads", PERFORMANCE, "Threads of --async-write.", 1, click.INT),
)
GROUPS = {option.name: option.group for option in OPTIONS}


def _installed() -> str:
    from importlib.metadata import version

    return version("mergekit")


class MergekitCommand(click.Command):
    """A command whose help groups mergekit's options, its own first."""

    def format_options(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        """Write the options in groups, in the order in which they are declared."""
        groups: dict[str, list[tuple[str, str]]] = {OWN: []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                group = GROUPS.get(param.name or "", OWN)
                groups.setdefault(group, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; an unknown option may be one of a mergekit that is not `MERGEKIT`."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            installed = _installed()
            if installed == MERGEKIT:
                raise
            message = (
                f"{error.message} (mergekit {installed} is installed; this command "
                f"knows the options of mergekit {MERGEKIT})"
            )
            raise click.NoSuchOption(
                error.option_name, message, error.possibilities, ctx
            ) from None


def mergekit_options(function: Callable[..., R]) -> Callable[..., R]:
    """Give a command mergekit's options; it gets them as `merge_options`.

    Before the command runs, the method `rpam` is registered with mergekit.
    """

    @functools.wraps(function)
    def callback(**options: Any) -> R:
        values = {option.name: options.pop(option.name) for option in OPTIONS}
        context = click.get_current_context()
        given = {
            name: value
            for name, value in values.items()
            if context.get_parameter_source(name) is not ParameterSource.DEFAULT
        }
        return function(merge_options=make_merge_options(given), **options)

    decorated: Callable[..., R] = callback
    for option in reversed(OPTIONS):
        decorated = option.declare()(decorated)
    return decorated


def make_merge_options(given: dict[str, Any]) -> MergeOptions:
    """Return mergekit's options with the values given; others have its defaults.

    Registers the method `rpam`. Raises `RpamError` for options that the installed
    mergekit no longer has: it would ignore them in silence.
    """
    from rpam_mergekit.merging.hooks import activate

    activate()
    from mergekit.options import MergeOptions

    unknown = [name for name in given if name not in MergeOptions.model_fields]
    if unknown:
        names = ", ".join("--" + name.replace("_", "-") for name in unknown)
        raise RpamError(
            f"{names}: mergekit {_installed()}, which is installed, has no such "
            f"option; mergekit {MERGEKIT} had it."
        )
    return MergeOptions(**given)
