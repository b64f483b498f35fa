"""Load PILON models in transformers, as a quantisation method that replaces the projections.

from_pretrained(folder)
  config.json  quantization_config {"quant_method": "pilon", "layout": ...}
    -> PilonConfig -> PilonQuantizer
         before the weights (model on the meta device): install(model, layout); with PILON_VERIFY=1 every file of the
         folder is compared with its checksum in manifest.json first, and ValueError names one that differs
         after the weights: refuse gaps, cut, then dissolve, so that an ordinary nn.Module remains

from_pretrained(folder, keep=0.7)
  config.json of an elastic file has `keep`, which transformers overrides by the argument, as any field of a config; the
  weights are then cut by what elastic.safetensors says (`elastic.cut`)
"""

import os
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from pilon_compress.elastic.worth import FILE, HOW, check_keep, read
from pilon_compress.io.checksum import damage
from pilon_compress.nn.install import install
from pilon_compress.nn.installed import layout_of, parts, stored_types
from pilon_compress.nn.layout import Host, Layout
from pilon_compress.nn.loading import LOADING

VERIFY = "PILON_VERIFY"  # environment: compare every file with its checksum when a model is loaded
KEEP = "keep"  # field of an elastic file's config.json: the share of its numbers to load
FORMAT_VERSION = 2  # 2: ternary and packed banks, integer banks


class PilonConfig(QuantizationConfigMixin):
    """The `quantization_config` entry of config.json: the layout, and the version of the format it is written in."""

    def __init__(self, layout: Any = None, format_version: int = FORMAT_VERSION, **unused: Any) -> None:
        if type(format_version) is not int or format_version < 1:
            raise ValueError(f"format_version {format_version!r:.60} is no PILON format: config.json is damaged")
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint is in PILON format {format_version}, newer than the {FORMAT_VERSION} read here: "
                "upgrade pilon-compress"
            )
        Layout.from_dict(layout)  # refused now, before anything is made of it
        self.quant_method = "pilon"
        self.format_version = format_version
        self.layout = layout


class PilonQuantizer(HfQuantizer):
    """Installs the layout before the weights are read and leaves no trace on the model afterwards."""

    requires_calibration = False

    @property
    def is_trainable(self) -> bool:
        """Return True: a PILON model trains like any module."""
        return True

    def is_serializable(self) -> bool:
        """Return True: a PILON model can be saved."""
        return True

    def _process_model_before_weight_loading(self, model: Host, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError("a dense checkpoint becomes PILON with `pilon-compress convert`, not while it is loaded")
        if os.environ.get(VERIFY, "") not in ("", "0"):
            verify_files(kwargs.get("checkpoint_files") or ())
        self._files = list(kwargs.get("checkpoint_files") or ())
        if KEEP in vars(model.config):
            check_keep(model.config.keep)
        install(model, Layout.from_dict(self.quantization_config.layout))
        model._keep_in_fp32_modules_strict.update(
            name for name, dtype in stored_types(model).items() if dtype == torch.float32
        )
        self._loading = LOADING.get()
        if self._loading is not None:
            self._loading.before(model)

    def _process_model_after_weight_loading(self, model: Host, **kwargs: Any) -> None:
        refuse_gaps(model)
        refuse_damage(model)
        keep = model.config.__dict__.pop(KEEP, 1)  # models that are made of this one are not elastic
        if keep != 1:
            shrink(model, self._files, keep)
        if self._loading is not None:
            self._loading.after(model, [Path(file) for file in self._files])
        dissolve(model)


def verify_files(weights: Iterable[str]) -> None:
    """Raise ValueError if a file of the folder that holds `weights` is not as the manifest there lists it."""
    for folder in {Path(file).parent for file in weights}:
        if reason := damage(folder):
            raise ValueError(f"{reason}: the file is damaged")


def shrink(model: Host, weights: Iterable[str], keep: float) -> None:
    """Cut a model that was loaded from the files `weights`; its config says the smaller layout.

    Raises ValueError where the file that says how is missing or damaged, or tensors are not in memory.
    """
    # here, since it imports the class that transformers may be making now; by name, since transformers looks for the
    # packages that a self-contained folder imports, and would ask for this one
    cut = import_module("pilon_compress.elastic.cut").cut
    file = next((Path(one).parent / FILE for one in weights), Path(FILE))
    if not file.is_file():  # in the hub's cache it may not have been downloaded yet
        found = cached_file(model.config._name_or_path, FILE, _raise_exceptions_for_missing_entries=False)
        if found is None:
            raise ValueError(f"keep={keep:g} needs {FILE}, which is not beside the weights: {HOW}")
        file = Path(found)
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ValueError(f"keep={keep:g} needs all weights in memory: load without offloading")
    cut(model, read(file), keep)
    layout = layout_of(model)
    model.config.quantization_config = PilonConfig(layout.to_dict(), 2 if layout.quantized else 1)


def refuse_gaps(model: Host) -> None:
    """Raise ValueError if a PILON tensor was not in the file: transformers would leave it as random memory."""
    lost = [
        f"{name}.{key}"
        for name, part in parts(model)
        for key, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        if key not in part._non_persistent_buffers_set
        and not tensor.is_meta  # offloaded to disk
        and not getattr(tensor, "_is_hf_initialized", False)
    ]
    if lost:
        raise ValueError(f"the checkpoint lacks {len(lost)} PILON tensors, the first is {lost[0]}")


def refuse_damage(model: Host) -> None:
    """Raise ValueError for codes that are none, and scales that are zero or not finite."""
    for name, part in parts(model):
        tensors = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if not any(tensor.is_meta for tensor in tensors) and (reason := part.refuse()):
            raise ValueError(f"{name} {reason}: the file is corrupt")


def dissolve(model: Host) -> None:
    """Take the quantizer off the model: it would block .half(), ignore save_pretrained(state_dict=), upset Trainer."""
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_is_quantized"):
            del config._is_quantized


if "pilon" not in AUTO_QUANTIZER_MAPPING:  # a self-contained folder brings its own copy of this file
    register_quantization_config("pilon")(PilonConfig)
    register_quantizer("pilon")(PilonQuantizer)
