"""The import hook holds in every way in which Python imports or runs a module.

Most ways are tried on a small mergekit and a small plugin of the same shape, as that is
quick and works on Pythons without torch; the last tests are on mergekit itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers.paths import ROOT

STARTUP = ROOT / "rpam_mergekit" / "_startup.py"
SMALL = {
    "mergekit/__init__.py": "",
    "mergekit/merge_methods/__init__.py": "METHODS = []\n",
    "mergekit/merge_methods/notes.txt": "read as data",
    "mergekit/plan.py": """
class MergePlanner:
    def plan_to_disk(self):
        return "plain"
""",
    "mergekit/merge.py": """
from mergekit.plan import MergePlanner

def run_merge():
    return "plain " + MergePlanner().plan_to_disk()
""",
    "mergekit/scripts/__init__.py": "",
    "mergekit/scripts/run_yaml.py": """
from mergekit.merge import run_merge

if __name__ == "__main__":
    print(run_merge())
""",
    "mergekit/scripts/multimerge.py": """
from __future__ import annotations
from mergekit.merge import run_merge

def load_config():
    return "plain"

if __name__ == "__main__":
    print(load_config(), run_merge(), type(__loader__).__name__)
""",
    "small-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: small\nVersion: 1\n",
    "rpam_mergekit/__init__.py": "",
    "rpam_mergekit/merging/__init__.py": "",
    # As the real ones, these import no module of mergekit at their top that is awaited
    # by the other: threads that import both would wait for each other.
    "rpam_mergekit/merging/method.py": """
import sys
import mergekit.merge_methods as merge_methods

def register(module):
    if "rpam" not in merge_methods.METHODS:
        merge_methods.METHODS.append("rpam")

if "rpam_mergekit._startup" in sys.modules:
    sys.modules["rpam_mergekit._startup"].catch_up()
""",
    "rpam_mergekit/merging/hooks.py": """
import sys

def wrap(owner, name):
    if getattr(owner, name).__name__ != "hooked":
        def hooked(*args):
            return "hooked"
        setattr(owner, name, hooked)

def hook_run_merge(module):
    wrap(module, "run_merge")

def hook_multimerge(module):
    wrap(module, "load_config")

if "rpam_mergekit._startup" in sys.modules:
    sys.modules["rpam_mergekit._startup"].catch_up()
""",
}
# Printed last by every program here: is everything hooked, also where it was imported?
STATE = """
import mergekit.merge, mergekit.merge_methods
import mergekit.scripts.multimerge, mergekit.scripts.run_yaml
print(
    *mergekit.merge_methods.METHODS,
    mergekit.merge.run_merge(),
    mergekit.scripts.multimerge.load_config(),
    mergekit.scripts.multimerge.run_merge(),
    mergekit.scripts.run_yaml.run_merge(),
)
"""
HOOKED = "rpam hooked hooked hooked hooked\n"
PLAIN = "plain plain plain plain plain plain plain\n"
FIRST = """
import importlib, sys
import importlib.util as util
AWAITED = (
    "mergekit.merge_methods",
    "mergekit.merge",
    "mergekit.scripts.multimerge",
)
def put(name, module):
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    setattr(importlib.import_module(parent), last, module)
"""
OFF = {"RPAM_MERGEKIT_AUTOLOAD": "0"}
ARM = """
import os
del os.environ["RPAM_MERGEKIT_AUTOLOAD"]
import rpam_mergekit._startup
rpam_mergekit._startup.arm()
"""
# The ways: what a program does before it uses mergekit.
WAYS = {
    "plainly": "",
    "after its spec was asked for": FIRST
    + """
for name in AWAITED:
    assert util.find_spec(name).loader.is_package(name) == name.endswith("methods")
""",
    "by hand, from its spec": FIRST
    + """
for spec in [util.find_spec(name) for name in AWAITED[1:]]:
    name, module = spec.name, util.module_from_spec(spec)
    put(name, module)
    spec.loader.exec_module(module)
    assert module.__loader__ is spec.loader and module.__spec__ is spec
""",
    "into a module without a spec": FIRST
    + """
import types
for spec in [util.find_spec(name) for name in AWAITED[1:]]:
    name, module = spec.name, types.ModuleType(spec.name)
    spec.loader.exec_module(module)
    put(name, module)
""",
    "lazily": FIRST
    + """
for name in AWAITED[1:]:
    spec = util.find_spec(name)
    loader = spec.loader = util.LazyLoader(spec.loader)
    module = util.module_from_spec(spec)
    put(name, module)
    loader.exec_module(module)
assert "rpam_mergekit.merging.method" not in sys.modules  # nothing has run yet
""",
    "again": FIRST
    + """
for name in AWAITED * 2:
    module = importlib.reload(importlib.import_module(name))
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    assert module.__spec__.loader is module.__loader__
""",
    "before the hook is armed": FIRST
    + """
for name in (*AWAITED, "mergekit.scripts.run_yaml"):
    importlib.import_module(name)
"""
    + ARM,
    "partly before the hook is armed": "import mergekit.scripts.run_yaml\n" + ARM,
    "by the plugin": "import rpam_mergekit.merging.method\n",
    "by many threads": FIRST
    + """
import threading
names = (*AWAITED, "mergekit.scripts.run_yaml")
barrier = threading.Barrier(3 * len(names))
def work(name):
    barrier.wait()
    importlib.import_module(name)
threads = [threading.Thread(target=work, args=(name,)) for name in 3 * names]
for thread in threads: thread.start()
for thread in threads: thread.join()
""",
    "behind finders that ask the others": FIRST
    + """
class Asking:
    def __init__(self):
        self.asked, self.within = [], False
    def find_spec(self, name, path=None, target=None):
        if self.within or not name.startswith("mergekit."):
            return None
        self.within = True
        try:
            self.asked.append(name)
            return util.find_spec(name)
        finally:
            self.within = False
first, last = Asking(), Asking()
sys.meta_path.insert(0, first)
sys.meta_path.insert(2, last)
for name in AWAITED:
    importlib.import_module(name)
    assert name in first.asked and name in last.asked
""",
}


PYTHONS = [
    sys.executable,
    *(
        str(path)
        for minor in (12, 13)
        for path in sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
    ),
]


class Environment:
    """A virtual environment of any Python with the start-up file, without a package."""

    def __init__(self, python: str, folder: Path) -> None:
        subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
        self.python = str(folder / "bin" / "python")
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        printed = subprocess.check_output([self.python, "-c", where], text=True)
        self.site = Path(printed.strip())
        shutil.copy(ROOT / "startup" / "rpam_mergekit.pth", self.site)

    def add(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            path = self.site / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def run(self, *arguments: str, **environment: str):
        return subprocess.run(
            [self.python, *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=self.site.parent,
            env={**os.environ, "PYTHONPATH": "", **environment},
            check=False,
        )

    def prints(self, *arguments: str, **environment: str) -> str:
        """Return what a run prints that succeeds and says nothing else."""
        process = self.run("-W", "error", *arguments, **environment)
        assert process.returncode == 0, process.stderr
        assert not process.stderr
        return process.stdout


@pytest.fixture(scope="module", params=PYTHONS)
def small(request, tmp_path_factory) -> Environment:
    """Return an environment with the small mergekit and the real start-up module."""
    environment = Environment(request.param, tmp_path_factory.mktemp("small") / "venv")
    environment.add({**SMALL, "rpam_mergekit/_startup.py": STARTUP.read_text("utf-8")})
    return environment


@pytest.mark.parametrize("way", WAYS)
def test_the_hook_holds_when_mergekit_is_imported(small, way):
    off = OFF if ARM in WAYS[way] else {}
    assert small.prints("-c", WAYS[way] + STATE, **off) == HOOKED
    plain = WAYS[way].replace(ARM, "")
    assert small.prints("-c", plain + STATE, **OFF) == PLAIN


def test_the_hook_holds_when_a_module_is_run(small):
    """`python -m` runs a copy of the module that is named `__main__`."""
    multimerge, run_yaml = "mergekit.scripts.multimerge", "mergekit.scripts.run_yaml"
    assert small.prints("-m", multimerge) == "hooked hooked SourceFileLoader\n"
    assert small.prints("-m", run_yaml) == "hooked\n"
    profiled = small.prints("-m", "cProfile", "-m", multimerge)
    assert profiled.startswith("hooked hooked ")
    code = f"import runpy; print(runpy.run_module({multimerge!r})['load_config']())"
    assert small.prints("-c", code) == "hooked\n"  # neither imported nor __main__
    assert small.prints("-m", multimerge, **OFF).startswith("plain plain ")


@pytest.mark.parametrize("flag", ["-I", "-E", "-s", "-O", "-B"])
def test_flags_that_keep_site_keep_the_hook(small, flag):
    assert small.prints(flag, "-c", STATE) == HOOKED
    assert small.prints(flag, "-m", "mergekit.scripts.run_yaml") == "hooked\n"


def test_without_site_there_is_no_hook(small):
    code = "import sys; print('rpam_mergekit._startup' in sys.modules)"
    assert small.prints("-c", code) == "True\n"
    assert small.prints("-S", "-c", code) == "False\n"
    assert small.prints("-S", "-c", STATE, PYTHONPATH=str(small.site)) == PLAIN


def test_asking_does_not_change_what_python_knows_of_a_module(small):
    """Before the import and after it: loader, source, data, resources, copies."""
    code = """
import copy, importlib.machinery, importlib.metadata, importlib.resources
import importlib.util, inspect, pickle, pkgutil, sys
from pathlib import Path

def facts(name, loader, spec):
    return (
        isinstance(loader, importlib.machinery.SourceFileLoader),
        loader.get_filename(name),
        loader.get_source(name),
        loader.get_data(spec.origin),
        loader.is_package(name),
        type(loader.get_resource_reader(name)).__name__,
        *(type(f(loader)).__name__ for f in (copy.copy, copy.deepcopy)),
        pickle.loads(pickle.dumps(loader)) == getattr(loader, "_loader", loader),
        spec.origin, spec.cached, spec.has_location, spec.parent,
        spec.submodule_search_locations,
    )

for name in ("mergekit.merge_methods", "mergekit.merge"):
    asked = importlib.util.find_spec(name)
    file = Path(asked.origin)
    before = facts(name, asked.loader, asked)
    module = importlib.import_module(name)
    assert type(module.__loader__) is importlib.machinery.SourceFileLoader
    assert module.__spec__.loader is module.__loader__
    assert facts(name, module.__loader__, module.__spec__) == before
    assert before[:5] == (
        True, str(file), file.read_text(), file.read_bytes(), file.stem == "__init__"
    )
    assert inspect.getsource(module) == file.read_text()
    assert inspect.getsourcefile(module) == str(file)
    assert pkgutil.get_data(name, file.name) == file.read_bytes()
import mergekit, mergekit.merge_methods as package
text = importlib.resources.files(package).joinpath("notes.txt").read_text()
assert text == "read as data"
modules = pkgutil.walk_packages(mergekit.__path__, "mergekit.")
print(*(module.name for module in modules))
print(*(d.metadata["Name"] for d in importlib.metadata.distributions()))
"""
    printed = small.prints("-c", code)
    assert printed == small.prints("-c", code, **OFF)
    assert printed.split()[:2] == ["mergekit.merge", "mergekit.merge_methods"]
    assert printed.split()[-1] == "small"


def test_the_hook_holds_in_a_zip_and_without_source(small, tmp_path):
    with zipfile.ZipFile(tmp_path / "mergekit.zip", "w") as archive:
        for name, text in SMALL.items():
            if name.startswith("mergekit"):
                archive.writestr(name, text)
    show = "print(type(mergekit.merge.__loader__).__name__)"
    zipped = {"PYTHONPATH": str(tmp_path / "mergekit.zip")}
    assert small.prints("-c", STATE + show, **zipped) == HOOKED + "zipimporter\n"
    run = ("-m", "mergekit.scripts.multimerge")
    assert small.prints(*run, **zipped) == "hooked hooked zipimporter\n"
    code = (
        "import compileall, sys; compileall.compile_dir(sys.argv[1], quiet=1, legacy=1)"
    )
    shutil.copytree(small.site / "mergekit", tmp_path / "bare" / "mergekit")
    small.prints("-c", code, str(tmp_path / "bare"))
    for path in (tmp_path / "bare").rglob("*.py"):
        path.unlink()
    bare = {"PYTHONPATH": str(tmp_path / "bare")}
    assert small.prints("-c", STATE + show, **bare) == HOOKED + "SourcelessFileLoader\n"


def test_a_plugin_that_cannot_be_loaded_is_said_once_and_tried_again(small):
    code = (
        """
import sys
ours = ("rpam_mergekit.merging.method", "rpam_mergekit.merging.hooks")
sys.modules.update(dict.fromkeys(ours))
for name in ("mergekit.merge_methods", "mergekit.merge", "mergekit.scripts"):
    try:
        __import__(name)
    except ImportError:
        pass
for name in ours:
    del sys.modules[name]
"""
        + STATE
    )
    process = small.run("-c", code)
    assert process.stdout == HOOKED
    assert process.stderr.count("mergekit runs without the merge method 'rpam'") == 1


@pytest.mark.parametrize("python", PYTHONS)
def test_a_python_without_mergekit_starts_clean_and_silent(tmp_path, python):
    environment = Environment(python, tmp_path / "venv")
    names = ("__init__.py", "_startup.py")
    package = ROOT / "rpam_mergekit"
    environment.add({f"rpam_mergekit/{n}": (package / n).read_text() for n in names})
    code = """
import sys
print(*(name for name in sys.modules if name.startswith("rpam_mergekit")))
print(type(sys.meta_path[0]).__name__)
import importlib.util, importlib.metadata, json, pkgutil
importlib.invalidate_caches()
print(importlib.util.find_spec("mergekit"), importlib.util.find_spec("json").name)
try:
    import mergekit.merge_methods
except ModuleNotFoundError as error:
    print(error)
"""
    printed = environment.prints("-X", "dev", "-c", code)
    assert printed.splitlines() == [
        "rpam_mergekit rpam_mergekit._startup",
        "_Finder",
        "None json",
        "No module named 'mergekit'",
    ]
    assert "_Finder" not in environment.prints("-c", code, **OFF)


REAL = """
import mergekit.merge, mergekit.merge_methods
import mergekit.scripts.multimerge as multimerge, mergekit.scripts.run_yaml
known = [method.spec.name for method in mergekit.merge_methods.registered_methods()]
functions = (
    mergekit.merge.run_merge,
    multimerge.run_merge,
    mergekit.scripts.run_yaml.run_merge,
    multimerge.load_config,
    multimerge.MergeModelTask.execute,
)
print("rpam" in known, *(getattr(f, "rpam_mergekit", False) for f in functions))
"""


def with_mergekit(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the Python of the tests, which has mergekit and the start-up file."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


@pytest.mark.parametrize(
    "way", ["after its spec was asked for", "again", "before the hook is armed"]
)
def test_mergekit_itself_is_hooked(way):
    off = OFF if ARM in WAYS[way] else {}
    process = with_mergekit("-c", WAYS[way] + REAL, **off)
    assert process.stdout == " ".join(["True"] * 6) + "\n", process.stderr


@pytest.mark.parametrize("script", ["run_yaml", "multimerge"])
def test_mergekit_run_as_a_module_checks_the_config(tmp_path, script):
    config = tmp_path / "config.yml"
    config.write_text(
        "{name: one, merge_method: rpam, paramters: {}, models: [{model: a}]}"
    )
    folder = tmp_path / "out"
    out = [str(folder)] if script == "run_yaml" else ["-I", str(folder)]
    process = with_mergekit("-m", f"mergekit.scripts.{script}", str(config), *out)
    assert process.returncode == 1
    assert "paramters: unknown key. Did you mean 'parameters'?" in process.stderr
    assert "Traceback" not in process.stderr
    assert not list(folder.glob("*"))
