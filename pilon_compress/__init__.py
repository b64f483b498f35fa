"""PILON: feed-forward weights as compositions of low-rank primitives that a band of layers shares.

    import pilon_compress as pc
    model, report = pc.compress(model, tokenizer, pc.ConvertConfig(ffn_ratio=0.5), calibration=texts)
    pc.save(model, "out/half")

Importing this package is light (no torch) and is all that `AutoModel...from_pretrained` needs to load a PILON model.
The calls are described in docs/python-api.md.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as in _PUBLIC, which loads them when they are first used
    from pilon_compress.api.context import ModelLike as ModelLike
    from pilon_compress.api.context import Texts as Texts
    from pilon_compress.api.conversion import compress as compress
    from pilon_compress.api.conversion import convert_model as convert_model
    from pilon_compress.api.conversion import load as load
    from pilon_compress.api.conversion import save as save
    from pilon_compress.api.exporting import export as export
    from pilon_compress.api.measuring import benchmark as benchmark
    from pilon_compress.api.measuring import compare as compare
    from pilon_compress.api.measuring import evaluate as evaluate
    from pilon_compress.api.measuring import inspect as inspect
    from pilon_compress.api.training import add_exit_gates as add_exit_gates
    from pilon_compress.api.training import heal as heal
    from pilon_compress.api.training import train as train
    from pilon_compress.config.benchmark import BenchConfig as BenchConfig
    from pilon_compress.config.comparison import CompareConfig as CompareConfig
    from pilon_compress.config.conversion import CalibrationConfig as CalibrationConfig
    from pilon_compress.config.conversion import ConvertConfig as ConvertConfig
    from pilon_compress.config.conversion import Recipe as Recipe
    from pilon_compress.config.conversion import RefineConfig as RefineConfig
    from pilon_compress.config.evaluation import EvaluateConfig as EvaluateConfig
    from pilon_compress.config.export import ExportOptions as ExportOptions
    from pilon_compress.config.model import FfnConfig as FfnConfig
    from pilon_compress.config.model import HostConfig as HostConfig
    from pilon_compress.config.model import TernaryConfig as TernaryConfig
    from pilon_compress.config.training_calls import ExitGatesConfig as ExitGatesConfig
    from pilon_compress.config.training_calls import HealConfig as HealConfig
    from pilon_compress.config.training_calls import TrainConfig as TrainConfig
    from pilon_compress.config.training_sections import OptimizerConfig as OptimizerConfig
    from pilon_compress.config.training_sections import ScheduleConfig as ScheduleConfig
    from pilon_compress.errors import BadInput as BadInput
    from pilon_compress.models.families import find_sites as find_sites
    from pilon_compress.nn.bank import PrimitiveBank as PrimitiveBank
    from pilon_compress.nn.composed_linear import ComposedLinear as ComposedLinear
    from pilon_compress.nn.fold import fold as fold
    from pilon_compress.nn.install import install as install
    from pilon_compress.nn.layout import Layout as Layout
    from pilon_compress.results.benchmark import Benchmark as Benchmark
    from pilon_compress.results.comparison import Comparison as Comparison
    from pilon_compress.results.conversion import Report as Report
    from pilon_compress.results.evaluation import Evaluation as Evaluation
    from pilon_compress.results.export import ExportResult as ExportResult
    from pilon_compress.results.inspection import Inspection as Inspection
    from pilon_compress.results.sizes import Sizes as Sizes
    from pilon_compress.results.training import TrainResult as TrainResult

__version__ = "0.1.0"

_REGISTRY = "transformers.quantizers.auto"
_LOADER = "pilon_compress.export.transformers_plugin"
_PUBLIC = {  # public name -> module
    "compress": "api.conversion",
    "save": "api.conversion",
    "load": "api.conversion",
    "heal": "api.training",
    "train": "api.training",
    "add_exit_gates": "api.training",
    "evaluate": "api.measuring",
    "compare": "api.measuring",
    "inspect": "api.measuring",
    "benchmark": "api.measuring",
    "export": "api.exporting",
    "convert_model": "api.conversion",
    "ModelLike": "api.context",
    "Texts": "api.context",
    "ConvertConfig": "config.conversion",
    "CalibrationConfig": "config.conversion",
    "RefineConfig": "config.conversion",
    "EvaluateConfig": "config.evaluation",
    "CompareConfig": "config.comparison",
    "HealConfig": "config.training_calls",
    "TrainConfig": "config.training_calls",
    "ExitGatesConfig": "config.training_calls",
    "HostConfig": "config.model",
    "FfnConfig": "config.model",
    "TernaryConfig": "config.model",
    "OptimizerConfig": "config.training_sections",
    "ScheduleConfig": "config.training_sections",
    "BenchConfig": "config.benchmark",
    "ExportOptions": "config.export",
    "Recipe": "config.conversion",
    "Report": "results.conversion",
    "TrainResult": "results.training",
    "Evaluation": "results.evaluation",
    "Comparison": "results.comparison",
    "Inspection": "results.inspection",
    "Benchmark": "results.benchmark",
    "ExportResult": "results.export",
    "Sizes": "results.sizes",
    "BadInput": "errors",
    "ComposedLinear": "nn.composed_linear",
    "PrimitiveBank": "nn.bank",
    "Layout": "nn.layout",
    "install": "nn.install",
    "fold": "nn.fold",
    "find_sites": "models.families",
}
__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


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


class _Front(ModuleType):
    """The package. Its calls keep their names where a room of the same name is imported, as `evaluate` is."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _PUBLIC or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Front

if _REGISTRY in sys.modules:
    import_module(_LOADER)
elif not any(type(finder).__name__ == "_RegisterWithTransformers" for finder in sys.meta_path):
    sys.meta_path.insert(0, _RegisterWithTransformers())

if not TYPE_CHECKING:  # which would take every name for one of the package's

    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)

    def __dir__() -> list[str]:
        return sorted(__all__)
