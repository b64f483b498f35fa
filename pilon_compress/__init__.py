"""PILON: feed-forward weights as compositions of low-rank primitives that a band of layers shares.

Importing this package is light (no torch) and is all that `AutoModel...from_pretrained` needs to load a PILON model:

    import pilon_compress
    from transformers import AutoModel
    model = AutoModel.from_pretrained("out/minilm-half")
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_REGISTRY = "transformers.quantizers.auto"
_LOADER = "pilon_compress.export.transformers_plugin"
_PUBLIC = {  # public name -> module, or module:name where the module's own name would be hidden (the room `convert`)
    "ComposedLinear": "pilon_compress.nn.composed_linear",
    "PrimitiveBank": "pilon_compress.nn.bank",
    "Layout": "pilon_compress.nn.layout",
    "install": "pilon_compress.nn.layout",
    "fold": "pilon_compress.nn.fold",
    "find_sites": "pilon_compress.models.families",
    "Recipe": "pilon_compress.config.conversion",
    "convert_model": "pilon_compress.convert.pipeline:convert",
    "evaluate": "pilon_compress.evaluate.evaluate",
    "BadInput": "pilon_compress.errors",
}
__all__ = ["__version__", *_PUBLIC]


class _RegisterWithTransformers(MetaPathFinder):
    """Registers the PILON loader once transformers has executed its registry module, then leaves the import path."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        import_module(_LOADER)

    def __getattr__(self, name: str) -> Any:  # get_source and the like, for tracebacks and inspect
        return getattr(self.inner, name)


if _REGISTRY in sys.modules:
    import_module(_LOADER)
elif not any(type(finder).__name__ == "_RegisterWithTransformers" for finder in sys.meta_path):
    sys.meta_path.insert(0, _RegisterWithTransformers())


class _Front(ModuleType):
    """The package. Its calls keep their names where a room of the same name is imported, as `evaluate` is."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _PUBLIC or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Front


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        module, _, attribute = _PUBLIC[name].partition(":")
        return getattr(import_module(module), attribute or name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
