"""Arms the import hook that makes stock mergekit commands know the method `rpam`.

Run by every Python start of the environment (`rpam_mergekit.pth`, from Python 3.15
`rpam_mergekit.start`), so: standard library only, nothing done until mergekit itself
is imported, never an exception. `RPAM_MERGEKIT_AUTOLOAD=0` switches it off.

mergekit 0.1.5 has no plugin discovery. Its own `register` is complete once the package
`mergekit.merge_methods` has run; the planner and the commands that import it are later.
"""

import os
import sys

TYPE_CHECKING = False  # as of typing, which a start of Python need not import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

SWITCH = "RPAM_MERGEKIT_AUTOLOAD"
# mergekit module -> module and function of ours that is called once it has run
HOOKS = {
    "mergekit.merge_methods": ("rpam_mergekit.merging.method", "register"),
    "mergekit.merge": ("rpam_mergekit.merging.hooks", "hook_run_merge"),
    "mergekit.scripts.multimerge": ("rpam_mergekit.merging.hooks", "hook_multimerge"),
}


class _Finder:
    """A meta path finder that runs one hook after each awaited module, once."""

    def __init__(self) -> None:
        self.awaited = dict(HOOKS)
        # Hooks and modules, until the plugin is imported.
        self.put_off: list[tuple[str, ModuleType]] = []

    def find_spec(
        self,
        name: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        hook = self.awaited.pop(name, None)
        if hook is None:
            return None
        from importlib.util import find_spec

        spec = find_spec(name)  # asks the other finders: this one no longer answers
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, hook, self)  # type: ignore[assignment]
        return spec


class _Loader:
    """Delegates to the real loader, then calls the hook with the loaded module."""

    def __init__(
        self, loader: "Loader", hook: "tuple[str, str]", finder: _Finder
    ) -> None:
        self.loader, self.hook, self.finder = loader, hook, finder

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        return self.loader.create_module(spec)

    def exec_module(self, module: "ModuleType") -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        name, function = self.hook
        plugin = sys.modules.get(name)
        if plugin is not None and not hasattr(plugin, function):
            # The plugin is being imported, and that imports mergekit.
            self.finder.put_off.append((function, module))
            return
        try:
            import importlib

            getattr(importlib.import_module(name), function)(module)
        except Exception as error:
            self.finder.awaited.clear()
            import warnings

            warnings.warn(
                "mergekit runs without the merge method 'rpam': rpam_mergekit could "
                f"not be loaded ({type(error).__name__}: {error}). Reinstall "
                f"rpam-mergekit, or set {SWITCH}=0 to silence this.",
                RuntimeWarning,
                stacklevel=2,
            )


def catch_up(plugin: "ModuleType") -> None:
    """Run the hooks that were put off while `plugin` was being imported."""
    for finder in sys.meta_path:
        put_off = getattr(finder, "put_off", [])
        while type(finder).__name__ == _Finder.__name__ and put_off:
            hook, module = put_off.pop(0)
            getattr(plugin, hook)(module)


def arm() -> None:
    """Install the hook, once; does nothing when switched off or armed already."""
    if os.environ.get(SWITCH) == "0":
        return
    if not any(
        type(finder).__name__ == _Finder.__name__
        and type(finder).__module__ == __name__
        for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, _Finder())


arm()
