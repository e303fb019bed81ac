"""Arms the import hook that makes stock mergekit commands know the method `rpam`.

Run by every Python start of the environment (`rpam_mergekit.pth`, from Python 3.15
`rpam_mergekit.start`), so: standard library only, nothing done until mergekit itself
is imported, never an exception. `RPAM_MERGEKIT_AUTOLOAD=0` switches it off.

mergekit 0.1.5 has no plugin discovery. Its own `register` is complete once the package
`mergekit.merge_methods` has run; the planner and the commands that import it are later.
"""

import os
import sys

SWITCH = "RPAM_MERGEKIT_AUTOLOAD"
# mergekit module -> the function of rpam_mergekit.merging.method called once it has run
HOOKS = {
    "mergekit.merge_methods": "register",
    "mergekit.plan": "hook_planner",
    "mergekit.merge": "hook_run_merge",
    "mergekit.scripts.multimerge": "hook_multimerge",
}


class _Finder:
    """A meta path finder that runs a hook whenever an awaited module has run."""

    def __init__(self) -> None:
        self.pending: list = []  # (hook, module), until the plugin is imported
        self.warned = False

    def find_spec(self, name, path=None, target=None):
        """Return what the finders behind this one find, with a loader that hooks."""
        if name not in HOOKS:
            return None
        finders = list(sys.meta_path)
        while finders and finders.pop(0) is not self:
            pass
        for finder in finders:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, name, self)
                return spec
        return None

    def has_run(self, name: str, module) -> None:
        """Run the hook of a module, or put it off until the plugin is imported."""
        hook = HOOKS[name]
        self.pending.append((hook, module))
        try:
            import rpam_mergekit.merging.method as plugin

            # It lacks the hook while it is being imported, which imports mergekit.
            if hasattr(plugin, hook):
                self.catch_up(plugin)
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

    def catch_up(self, plugin) -> None:
        """Run the hooks that were put off."""
        while self.pending:
            hook, module = self.pending.pop(0)
            before = dict(vars(module))
            getattr(plugin, hook)(module)
            _rebind(before, vars(module))


class _Loader:
    """Delegates to the real loader, then calls the hook with the loaded module.

    It is seen by those who ask for a spec; a module that has run has the real one.
    """

    def __init__(self, loader, name: str, finder: _Finder) -> None:
        self._loader, self._name, self._finder = loader, name, finder

    # For isinstance, copies and pickles it is the real loader.
    __class__ = property(lambda self: self._loader.__class__)

    def __reduce_ex__(self, protocol):
        return self._loader.__reduce_ex__(protocol)

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:
        self.give_back(module)
        self._loader.exec_module(module)
        self._finder.has_run(self._name, module)

    def give_back(self, module) -> None:
        """Put the real loader where the import system has put this one."""
        for owner, attribute in (
            (module, "__loader__"),
            (getattr(module, "__spec__", None), "loader"),
        ):
            if getattr(owner, attribute, None) is self:
                setattr(owner, attribute, self._loader)

    def get_code(self, name):
        """Return the code, which calls the hook before `if __name__ == "__main__":`.

        `python -m` and its like ask for it and run it as the module `__main__`.
        """
        code = self._loader.get_code(name)
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
            return compile(tree, code.co_filename, "exec", dont_inherit=True)
        except Exception:  # no source, or nothing that is for `__main__` alone
            return code


class _Namespace:
    """What a module is to a hook, of the globals of a program."""


def main_has_run(name, variables) -> None:
    """Run the hook of an awaited module that is running as a program."""
    module = _Namespace()
    module.__dict__ = variables
    loader = variables.get("__loader__")
    if type(loader) is _Loader:
        loader.give_back(module)
    for finder in _armed():
        finder.has_run(name, module)


def catch_up(plugin) -> None:
    """Run the hooks that were put off while `plugin` was being imported."""
    for finder in _armed():
        finder.catch_up(plugin)


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


def _armed() -> list:
    return [
        finder
        for finder in sys.meta_path
        if type(finder).__name__ == _Finder.__name__
        and type(finder).__module__ == __name__
    ]


def _rebind(before: dict, now: dict) -> None:
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
