"""Arms the import hook that makes stock mergekit commands know the method `rpam`.

Run by every Python start of the environment (`rpam_mergekit.pth`, from Python 3.15
`rpam_mergekit.start`), so: standard library only, nothing done until mergekit itself
is imported, never an exception. `RPAM_MERGEKIT_AUTOLOAD=0` switches it off.

mergekit 0.1.5 has no plugin discovery. Its own `register` is complete once the package
`mergekit.merge_methods` has run; `run_merge` and the commands that import it are later.
"""

import os
import sys

TYPE_CHECKING = False  # as of typing, which a start of Python need not import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType
    from typing import Any

SWITCH = "RPAM_MERGEKIT_AUTOLOAD"
# mergekit module -> our module and its function that is called once it has run
HOOKS = {
    "mergekit.merge_methods": ("rpam_mergekit.merging.method", "register"),
    "mergekit.merge": ("rpam_mergekit.merging.hooks", "hook_run_merge"),
    "mergekit.scripts.multimerge": ("rpam_mergekit.merging.hooks", "hook_multimerge"),
}


class _Finder:
    """A meta path finder that runs a hook whenever an awaited module has run."""

    def __init__(self) -> None:
        # Names of mergekit's modules and these, until our module is imported.
        self.pending: list[tuple[str, Any]] = []
        self.warned = False

    def find_spec(
        self,
        name: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        """Return what the finders behind this one find, with a loader that hooks."""
        if name not in HOOKS:
            return None
        finders = list(sys.meta_path)
        while finders and finders.pop(0) is not self:
            pass
        for finder in finders:
            find = getattr(finder, "find_spec", None)
            spec: Any = find(name, path, target) if find else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, name, self)
                found: ModuleSpec = spec
                return found
        return None

    def has_run(self, name: str, module: "Any") -> None:
        """Run the hook of a module, or put it off until ours is imported."""
        self.pending.append((name, module))
        try:
            self.catch_up()
        except Exception as error:
            if self.warned:
                return
            self.warned = True
            import warnings

            warnings.warn(
                "mergekit runs without the merge method 'rpam': rpam_mergekit could "
                f"not be loaded ({type(error).__name__}: {error}). Reinstall "
                f"rpam-mergekit, or set {SWITCH}=0 to silence this.",
                RuntimeWarning,
                stacklevel=3,
            )

    def catch_up(self) -> None:
        """Run the hooks that were put off."""
        for item in list(self.pending):
            name, module = item
            ours, function = HOOKS[name]
            hook = getattr(sys.modules.get(ours), function, None)
            if hook is None and not _is_being_imported(ours):
                try:
                    __import__(ours)
                except RuntimeError as error:
                    if type(error).__name__ != "_DeadlockError":
                        raise
                    # A thread that waits for this one imports it.
                hook = getattr(sys.modules.get(ours), function, None)
            if hook is None:
                continue  # who imports our module, maybe this thread, catches up behind
            try:
                self.pending.remove(item)
            except ValueError:  # the import has caught up itself, or a thread has
                continue
            before = dict(vars(module))
            hook(module)
            _rebind(before, vars(module))


class _Loader:
    """Delegates to the real loader, then calls the hook with the loaded module.

    It is seen by those who ask for a spec; a module that has run has the real one.
    """

    def __init__(self, loader: "Any", name: str, finder: _Finder) -> None:
        self._loader, self._name, self._finder = loader, name, finder

    # For isinstance, copies and pickles it is the real loader.
    __class__ = property(lambda self: self._loader.__class__)

    def __reduce_ex__(self, protocol: "Any") -> "Any":
        return self._loader.__reduce_ex__(protocol)

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._loader, name)

    def create_module(self, spec: "ModuleSpec") -> "Any":
        return self._loader.create_module(spec)

    def exec_module(self, module: "ModuleType") -> None:
        self.give_back(module)
        self._loader.exec_module(module)
        self._finder.has_run(self._name, module)

    def give_back(self, module: "Any") -> None:
        """Put the real loader where the import system has put this one."""
        for owner, attribute in (
            (module, "__loader__"),
            (getattr(module, "__spec__", None), "loader"),
        ):
            if getattr(owner, attribute, None) is self:
                setattr(owner, attribute, self._loader)

    def get_code(self, name: str) -> "CodeType | None":
        """Return the code, which calls the hook before `if __name__ == "__main__":`.

        `python -m` and its like ask for it and run it as the module `__main__`.
        """
        code: CodeType | None = self._loader.get_code(name)
        if code is None:
            return None
        try:
            import ast

            tree = ast.parse(self._loader.get_source(name))
            guard = next(
                number
                for number, statement in enumerate(tree.body)
                if isinstance(statement, ast.If) and "__main__" in ast.dump(statement)
            )
            call = f"main_has_run({name!r}, globals())"
            call = f"__import__({__name__!r}, fromlist=['']).{call}"
            tree.body[guard:guard] = ast.parse(call).body
            whole: CodeType = compile(tree, code.co_filename, "exec", dont_inherit=True)
            return whole
        except Exception:  # no source, or nothing that is for `__main__` alone
            return code


class _Namespace:
    """What a module is to a hook, of the globals of a program."""


def main_has_run(name: str, variables: "dict[str, Any]") -> None:
    """Run the hook of an awaited module that is running as a program."""
    module = _Namespace()
    module.__dict__ = variables
    loader = variables.get("__loader__")
    if type(loader) is _Loader:
        loader.give_back(module)
    for finder in _armed():
        finder.has_run(name, module)


def catch_up() -> None:
    """Run the hooks that were put off while a module of ours was being imported."""
    for finder in _armed():
        finder.catch_up()


def arm() -> None:
    """Install the hook, once; does nothing when switched off or armed already."""
    if os.environ.get(SWITCH) == "0" or _armed():
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    for name in HOOKS:  # those that were imported before
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None)
        if module is not None and not getattr(spec, "_initializing", False):
            finder.has_run(name, module)


def _armed() -> "list[Any]":
    return [
        finder
        for finder in sys.meta_path
        if type(finder).__name__ == _Finder.__name__
        and type(finder).__module__ == __name__
    ]


def _is_being_imported(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _rebind(before: "dict[str, Any]", now: "dict[str, Any]") -> None:
    """Give what a hook has replaced to modules of mergekit that had imported it."""
    replaced = {
        id(old): now[name] for name, old in before.items() if now[name] is not old
    }
    for name, module in list(sys.modules.items()):
        if replaced and name.startswith("mergekit.") and isinstance(module, type(sys)):
            names = object.__getattribute__(module, "__dict__")  # loads no lazy module
            for known_as, value in list(names.items()):
                if id(value) in replaced:
                    names[known_as] = replaced[id(value)]


arm()
