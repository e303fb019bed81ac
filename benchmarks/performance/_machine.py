"""What the benchmarks share: command lines, processes of their own, tables.

It is no command. `own_process` runs a function in a fresh process and records its time
and its peak memory above what the interpreter and the libraries take. Anonymous
memory is what a process has written itself; mapped memory is pages of files, which
the system can drop (checkpoints are memory-mapped, so that reading one makes it grow).
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rpam_mergekit.text import markdown_table

INTERVAL = 0.005  # seconds between two looks at a process's memory
MIB = 2**20


def command_line(
    description: str | None, quick: Mapping[str, Any] | None = None, **options: Any
) -> argparse.Namespace:
    """Return the options of the command line of a script with this docstring.

    An option is given by its default, by its type where it has none, or by a pair of
    that and its help. `quick` has the defaults under `--quick`, a test of the script.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, option in options.items():
        default, words = option if isinstance(option, tuple) else (option, None)
        kind = default if isinstance(default, type) else type(default)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=None if kind is default else default,
            help=words,
        )
    if quick is not None:
        words = "shortened: a test of this script, no measurement"
        parser.add_argument("--quick", action="store_true", help=words)
        if "--quick" in sys.argv:
            parser.set_defaults(**quick)
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    """Return the numbers of an option such as `8,16,32`."""
    return [int(number) for number in text.split(",")]


@dataclass(frozen=True)
class Outcome:
    """What a function returned, and the process it ran in.

    seconds: from the first line of the function to its return. anonymous, mapped,
    resident: peaks in bytes above what the process took before; the first two are
    sampled every 5 ms, the last is the kernel's own high-water mark.
    """

    value: Any
    seconds: float
    anonymous: int
    mapped: int
    resident: int


def own_process(
    function: Callable[..., Any], *arguments: Any, start: str = "fork"
) -> Outcome:
    """Return the outcome of ``function(*arguments)`` in a process of its own.

    What it returns must not hold tensors, whose memory would go with the process.
    With `start` "fork" the libraries that this process has imported need not be
    imported again; it must not have used CUDA or several threads. "spawn" starts a
    bare interpreter. Raises `RuntimeError` if the function raises or dies.
    """
    context = multiprocessing.get_context(start)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        ours.recv()  # it has imported what it needs
        before = _memory(process.pid)
        peak = dict(before)
        ours.send("go")
        while not ours.poll(INTERVAL):
            now = _memory(process.pid)
            peak = {key: max(value, now.get(key, 0)) for key, value in peak.items()}
        error, value, seconds, last = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__} died: {process.exitcode}") from None
    process.join()
    if error:
        raise RuntimeError(f"{function.__name__} failed:\n{error}")
    above = {key: max(peak[key], last[key]) - before[key] for key in peak}
    return Outcome(
        value,
        seconds,
        anonymous=above["RssAnon"],
        mapped=above["RssFile"] + above["RssShmem"],
        resident=max(last["VmHWM"] - before["VmRSS"], above["VmRSS"]),
    )


def _serve(pipe: Any, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    pipe.send("ready")
    pipe.recv()
    began = time.perf_counter()
    error = value = None
    try:
        value = function(*arguments)
    except BaseException:
        error = traceback.format_exc()
    seconds = time.perf_counter() - began
    pipe.send((error, value, seconds, _memory(os.getpid())))


def _memory(pid: int | None) -> dict[str, int]:
    """Return the memory lines of /proc/PID/status in bytes; none if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    wanted = ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem")
    pairs = (line.split(":") for line in lines if line.startswith(wanted))
    return {key: int(value.split()[0]) * 1024 for key, value in pairs}


def describe(device: str = "cpu") -> str:
    """Return the machine, the libraries, the commit and how busy the machine is."""
    import torch

    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "mergekit")
    )
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    where = f"{_processor()}, {os.cpu_count()} cores, {_total_memory()} GiB"
    if device.startswith("cuda"):
        name = own_process(torch.cuda.get_device_name, start="spawn").value
        where = f"{name}; {where}"
    return (
        f"{where}; {platform.system()}, Python {platform.python_version()}, "
        f"{libraries}, {torch.get_num_threads()} threads; commit {_commit()}; load "
        f"{load} (1, 5, 15 minutes, at the end)"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


def _total_memory() -> int:
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return found.stdout.strip() or "unknown"


def spread(values: Iterable[float], form: str = ".2f") -> str:
    """Return the median and, of several values, the least and the most."""
    found = sorted(values)
    middle = format(statistics.median(found), form)
    if len(found) == 1:
        return middle
    return f"{middle} ({format(found[0], form)}, {format(found[-1], form)})"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    return "\n".join(markdown_table(head, rows))


def mib(count: float) -> str:
    """Return a number of bytes in MiB."""
    return f"{count / MIB:.0f}"
