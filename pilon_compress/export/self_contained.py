"""Exports to a folder that brings its loading code along: it loads where pilon-compress is not installed."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import auto_factory, modeling_auto

from pilon_compress.config.export import ExportOptions
from pilon_compress.config.research import bound
from pilon_compress.export import transformers_plugin
from pilon_compress.export.bundle import bundle
from pilon_compress.export.registry import ExportJob, exporter
from pilon_compress.export.save import MODELING_FILE, save_beside
from pilon_compress.nn.formats.registry import FORMATS
from pilon_compress.nn.installed import layout_of
from pilon_compress.nn.layout import Layout
from pilon_compress.results.export import Exported

HEADER = '''"""PILON for transformers, bundled by pilon-compress so that this folder loads without the package:

    AutoModel...from_pretrained(folder, trust_remote_code=True)

Generated from the package's own modules; do not edit.
"""
'''


def refuse(model: PreTrainedModel, options: ExportOptions) -> str | None:
    """Say why the code that `model` needs cannot travel with it; None if it can."""
    layout = layout_of(model)
    if layout.rest or not all(FORMATS[name].travels for name in layout.kinds):
        return "is packed: its kernels do not travel with it, it needs pilon-compress to load"
    if not all(hasattr(transformers, name) for name in host_classes(model).values()):
        return "is of an architecture that transformers does not have: its code does not travel with it"
    return None


@exporter(
    "self-contained",
    about="A copy that also holds the code to load it: no pilon-compress needed.",
    load="AutoModel.from_pretrained({folder!r}, trust_remote_code=True)",
    refuse=refuse,
    options=(),
)
def write(model: PreTrainedModel, job: ExportJob) -> Exported:
    """Write the folder, its code declared in config.json's `auto_map`; it loads as any PILON folder does, too."""
    classes = host_classes(model)
    stem = MODELING_FILE.removesuffix(".py")
    model.config.auto_map = {auto: f"{stem}.Pilon{host}" for auto, host in classes.items()}
    code = loading_code(sorted(set(classes.values())), layout_of(model))

    def add(folder: Path) -> None:
        (folder / MODELING_FILE).write_text(code, "utf-8")

    save_beside(model, job, model.dtype, add)
    return Exported()


def host_classes(model: PreTrainedModel) -> dict[str, str]:
    """Auto class -> host class name, for every auto class that knows this architecture."""
    found = {}
    autos: dict[str, Any] = vars(modeling_auto)
    for name, auto in autos.items():
        if isinstance(auto, type) and issubclass(auto, auto_factory._BaseAutoModelClass):
            mapping: Any = getattr(auto, "_model_mapping", None)
            host = mapping.get(type(model.config), None) if mapping else None
            if host is not None and hasattr(host, "__name__"):
                found[name] = host.__name__
    return {name: host for name, host in found.items() if not name.startswith("_")}


def loading_code(hosts: Iterable[str], layout: Layout) -> str:
    """Return one module: what loads a model of that layout, and a class for each class in `hosts`, by name."""
    formats = [sys.modules[FORMATS.origin(name)] for name in sorted({"none", *layout.kinds})]
    research = [bound(name, "form") for name in sorted(layout.research)]
    code = bundle([*formats, *research, transformers_plugin])
    imports = "from transformers import " + ", ".join(hosts)
    classes = "\n\n".join(f"class Pilon{host}({host}):\n    pass\n" for host in hosts)
    return "\n\n".join([HEADER, code, imports, "", classes])
