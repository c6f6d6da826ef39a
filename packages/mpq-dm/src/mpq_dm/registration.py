# SPDX-License-Identifier: Apache-2.0
"""Make diffusers know packed models once both packages are imported, in either order.

Nothing heavy is imported for it: if diffusers is not there yet, a finder waits for the module that
holds its tables of quantizers and registers when that has been executed.
"""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from tenfold_core.errors import MissingExtraError, TenfoldWarning

__all__ = ["register_with_diffusers"]

_TABLES = "diffusers.quantizers.auto"
_PLUGIN = "mpq_dm.plugin"


def register_with_diffusers() -> None:
    """Register now if diffusers is imported, else as soon as it is; again changes nothing."""
    if _TABLES in sys.modules:
        _register()
    elif not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        # by name: after a second import of this package the class is another
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    try:
        import_module(_PLUGIN)  # which registers itself
    except (ImportError, MissingExtraError) as error:
        # diffusers must stay usable without us, whatever it changed
        warnings.warn(
            f"mpq-dm cannot register with diffusers: {error}; install diffusers>=0.42",
            TenfoldWarning,
            stacklevel=2,
        )


class _Finder(MetaPathFinder):
    """Let the other finders find the module, and follow its execution."""

    def __init__(self) -> None:
        self.searching = False  # another finder may ask all finders in turn, as this one does

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLES or self.searching:
            return None
        self.searching = True
        try:
            specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """Execute a module as its own loader does, then register."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _register()
