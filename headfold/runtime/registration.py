"""Registers the attention `headfold` with transformers, now or as soon as transformers is imported."""

import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TRANSFORMERS_MODULE = "transformers.modeling_utils"
"""The module that keeps the registry. It is not imported here, as most of headfold does not need transformers, which takes seconds to
import.
"""
ATTENTION = "headfold.runtime.modeling_headfold"
REGISTERS = "headfold.runtime.attention"


def register_attention() -> None:
    """Register the attention now if transformers is imported, else install an import hook that does it later."""
    if TRANSFORMERS_MODULE in sys.modules:
        import_module(ATTENTION)
    elif not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())


class _RegisterOnImport(MetaPathFinder):
    """An import hook that removes itself when transformers' module is imported, and registers the attention after it."""

    def find_spec(self, name: str, path: Iterable[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TRANSFORMERS_MODULE:
            return None
        with suppress(ValueError):  # another thread was here first
            sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfterLoading(spec.loader)
        return spec


class _RegisterAfterLoading(Loader):
    """Runs the module's own loader, then registers the attention."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if REGISTERS not in sys.modules:  # else it is being imported now, and brought transformers along
            import_module(ATTENTION)
