"""Register the checkpoint format with Transformers, as soon as both are imported.

Transformers discovers a quantization method only if somebody registers it, and importing
Transformers takes seconds. So ``import fgmp`` does not import it. Where Transformers' model loader
is loaded already, the format is registered at once; else an import hook registers it at the end of
the loader's import, which is always before a model can be loaded.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_LOADER = "transformers.modeling_utils"
"""The module of Transformers that loads models; it imports all that the registration needs."""

_REGISTERING = "fgmp.model.transformers"


def register() -> None:
    """Register now, or when Transformers' model loader is imported."""
    loaded = sys.modules.get(_LOADER)
    if loaded is not None and hasattr(loaded, "PreTrainedModel"):
        importlib.import_module(_REGISTERING)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the loader's module like everyone else, and adds the registration to its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _LOADER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """Executes a module by its own loader, then registers the format."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(_REGISTERING)
