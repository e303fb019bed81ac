"""The plugin loads, stays out of the way, and leaves nothing behind.

Each environment is fresh; torch and mergekit come from the test environment by path,
which does not run that environment's own start-up files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from helpers.paths import ROOT

LIST = (
    "import mergekit.merge_methods as m; "
    "print([x.spec.name for x in m.registered_methods()])"
)
STARTUP_FILES = ("rpam_mergekit.pth", "rpam_mergekit.start")


class Environment:
    """A fresh virtual environment that sees the test environment's packages."""

    def __init__(self, folder: Path, with_packages: bool = True) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = str(folder / "bin" / "python")
        command = [
            self.python,
            "-c",
            "import sysconfig; print(sysconfig.get_path('purelib'))",
        ]
        self.site = Path(subprocess.check_output(command, text=True).strip())
        if with_packages:
            outer = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
            (self.site / "aaa_outer.pth").write_text("\n".join(dict.fromkeys(outer)))

    def run(self, *arguments: str, **environment: str):
        return subprocess.run(
            [self.python, *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=self.site,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            check=False,
        )

    def pip(self, *arguments: str) -> None:
        process = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "--python",
                self.python,
                "--quiet",
                *arguments,
            ],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert process.returncode == 0, process.stderr

    def install(self, *what: str) -> None:
        self.pip(
            "install", "--no-deps", "--no-build-isolation", "--ignore-installed", *what
        )

    def methods(self, **environment: str) -> str:
        process = self.run("-c", LIST, **environment)
        assert process.returncode == 0, process.stderr
        return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder]
    subprocess.run([*command, ROOT], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return str(built)


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path / "venv")


def test_nothing_is_known_before_the_installation(environment):
    assert "rpam" not in environment.methods()


def test_a_wheel_registers_and_uninstalls_without_a_trace(environment, wheel):
    before = {path.name for path in environment.site.iterdir()}
    environment.install(wheel)
    assert all((environment.site / name).exists() for name in STARTUP_FILES)
    assert "'rpam'" in environment.methods()
    environment.pip("uninstall", "--yes", "rpam-mergekit")
    after = {path.name for path in environment.site.iterdir()}
    assert after - {"__pycache__"} == before - {"__pycache__"}
    assert "'rpam'" not in environment.methods()


def test_an_editable_installation_registers_and_uninstalls(environment):
    before = {path.name for path in environment.site.iterdir()}
    environment.install("--editable", str(ROOT))
    assert "'rpam'" in environment.methods()
    environment.pip("uninstall", "--yes", "rpam-mergekit")
    after = {path.name for path in environment.site.iterdir()}
    assert after - {"__pycache__"} == before - {"__pycache__"}


def test_the_switch_turns_it_off(environment, wheel):
    environment.install(wheel)
    assert "'rpam'" not in environment.methods(RPAM_MERGEKIT_AUTOLOAD="0")
    assert "'rpam'" in environment.methods(RPAM_MERGEKIT_AUTOLOAD="1")


@pytest.mark.parametrize(
    "first",
    [
        "mergekit.merge_methods",
        *(
            f"rpam_mergekit.{name}"
            for name in (
                "merging.method",
                "checks.examine",
                "merging.fit",
                "prepass.run",
                "evaluate.sweep",
            )
        ),
    ],
)
def test_the_plugin_may_be_imported_before_mergekit(environment, wheel, first):
    environment.install(wheel)
    process = environment.run(
        "-W", "error::RuntimeWarning", "-c", f"import {first}; {LIST}"
    )
    assert process.returncode == 0, process.stderr
    assert "'rpam'" in process.stdout
    off = environment.run("-c", f"import {first}; {LIST}", RPAM_MERGEKIT_AUTOLOAD="0")
    assert "'rpam'" not in off.stdout


def test_a_broken_plugin_leaves_mergekit_working_and_says_why(environment, wheel):
    environment.install(wheel)
    (environment.site / "rpam_mergekit" / "merging" / "method.py").write_text("1 / 0\n")
    process = environment.run("-c", LIST + "; import mergekit.merge")
    assert process.returncode == 0
    assert "'linear'" in process.stdout
    assert "'rpam'" not in process.stdout
    assert process.stderr.count("mergekit runs without the merge method 'rpam'") == 1
    assert "ZeroDivisionError: division by zero" in process.stderr
    assert "RPAM_MERGEKIT_AUTOLOAD=0" in process.stderr


def test_without_torch_python_starts_silently_and_mergekit_names_torch(tmp_path, wheel):
    environment = Environment(tmp_path / "venv", with_packages=False)
    environment.install(wheel)
    process = environment.run("-c", "print('hello')")
    assert (process.stdout, process.stderr) == ("hello\n", "")
    shutil.copytree(
        Path(sysconfig.get_path("purelib")) / "mergekit", environment.site / "mergekit"
    )
    process = environment.run("-c", "import mergekit.merge_methods")
    assert "No module named 'torch'" in process.stderr
    assert "rpam" not in process.stderr.splitlines()[-1]


def test_start_up_imports_the_standard_library_only_and_little_of_it(
    environment, wheel
):
    environment.install(wheel)
    code = "import sys; print(*sorted(set(sys.modules)))"
    (environment.site / "aaa_outer.pth").unlink()
    with_it = set(environment.run("-c", code).stdout.split())
    without = set(
        environment.run("-c", code, RPAM_MERGEKIT_AUTOLOAD="0").stdout.split()
    )
    assert "rpam_mergekit._startup" in with_it
    assert with_it == without


def test_arming_twice_is_arming_once(environment, wheel):
    environment.install(wheel)
    code = (
        "import sys, rpam_mergekit._startup as s; s.arm(); s.arm(); "
        "print(sum(type(f).__name__ == '_Finder' for f in sys.meta_path))"
    )
    assert environment.run("-c", code).stdout == "1\n"


def test_the_loader_leaves_modules_as_it_found_them(environment, wheel):
    environment.install(wheel)
    code = (
        "import mergekit.merge_methods as m, inspect; "
        "print(type(m.__loader__).__name__, type(m.__spec__.loader).__name__); "
        "print(inspect.getsource(m)[:11])"
    )
    lines = environment.run("-c", code).stdout.splitlines()
    assert lines == ["SourceFileLoader SourceFileLoader", "# Copyright"]


def test_the_entry_point_names_the_method(environment, wheel):
    environment.install(wheel)
    code = (
        "from importlib.metadata import entry_points; "
        "(e,) = [e for e in entry_points(group='mergekit.merge_methods') "
        "if e.name == 'rpam'][:1]; print(e.load().spec.name)"
    )
    assert environment.run("-c", code).stdout == "rpam\n"


@pytest.mark.parametrize("minor", [10, 12, 13])
def test_the_start_up_files_work_on_other_pythons(tmp_path, minor):
    """Those without torch: the hook arms, and every file of the package compiles."""
    candidates = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
    if not candidates:
        pytest.skip(f"no Python 3.{minor} here")
    for name in ("rpam_mergekit.pth", "rpam_mergekit"):
        source = (ROOT / "startup" / name) if name.endswith("pth") else ROOT / name
        target = tmp_path / name
        if source.is_dir():
            shutil.copytree(
                source, target, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(source, target)
    code = (
        f"import site, sys; site.addsitedir({str(tmp_path)!r}); "
        "print(type(sys.meta_path[0]).__name__); "
        "import compileall; "
        f"print(compileall.compile_dir({str(tmp_path / 'rpam_mergekit')!r}, quiet=1))"
    )
    command = [str(candidates[-1]), "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (process.stdout, process.stderr) == ("_Finder\nTrue\n", "")


def test_the_page_on_security_shows_both_files_in_full():
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for name in STARTUP_FILES:
        content = (ROOT / "startup" / name).read_text()
        assert f"| `{name}` | `{content.strip()}` |" in page
        assert content.count("\n") == 1
