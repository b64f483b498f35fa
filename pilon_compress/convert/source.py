"""The dense model as conversion reads it: whole where it fits, else one block at a time from its safetensors files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from pilon_compress import checkpoint
from pilon_compress.convert.stream import blocks
from pilon_compress.errors import BadInput


class Source:
    """A dense model and its transformer blocks, in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        checkpoint.check_finite(model)
        self.model = model
        self.names = list(blocks(model))

    @property
    def device(self) -> torch.device:
        return self.model.device

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights, for as long as the context lasts."""
        yield self.model.base_model.get_submodule(self.names[index])


class Streamed(Source):
    """The same, with every block on the meta device until it is asked for: memory for one block, not for all.

    Weights come as `dtype` on `device`. Raises BadInput where the folder's tensors are not named as the model's, which
    transformers would have to convert; such a model must be loaded whole.
    """

    def __init__(self, reference: str, dtype: torch.dtype, device: torch.device) -> None:
        folder = Path(checkpoint.resolve(reference))
        if not folder.is_dir():
            raise BadInput(f"{reference} is not a local folder: only those can be read block by block")
        config = checkpoint.load_config(reference)
        with init_empty_weights(include_buffers=False):
            self.model = checkpoint.build(config)
        self.model.eval().requires_grad_(False)
        self.dtype, self._device = dtype, device
        self.names = list(blocks(self.model))
        self.files = self._locate(folder)
        inside = tuple(f"{self._prefix()}{name}." for name in self.names)
        outer = [name for name, _ in self.model.named_parameters() if not name.startswith(inside)]
        self._load(self.model, outer, "")
        self.model.tie_weights()
        for name, buffer in self.model.named_buffers():
            set_module_tensor_to_device(self.model, name, device, value=buffer)

    @property
    def device(self) -> torch.device:
        return self._device

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        module = self.model.base_model.get_submodule(self.names[index])
        prefix = f"{self._prefix()}{self.names[index]}."
        names = [name for name, _ in module.named_parameters()]
        self._load(module, names, prefix)
        try:
            yield module
        finally:
            module.to_empty(device="meta")

    def _prefix(self) -> str:
        model = self.model
        return "" if model.base_model is model else f"{model.base_model_prefix}."

    def _locate(self, folder: Path) -> dict[str, tuple[Path, str]]:
        """Parameter name -> the file that holds it and its name there, with or without the base model's prefix."""
        stored: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                stored |= dict.fromkeys(file.keys(), path)
        found, prefix = {}, f"{self.model.base_model_prefix}."
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        for name, _ in self.model.named_parameters():
            spellings = (name, name.removeprefix(prefix), prefix + name)
            spelling = next((one for one in spellings if one in stored), None)
            if spelling is not None:
                found[name] = (stored[spelling], spelling)
            elif name not in tied:
                raise BadInput(f"{folder} names {name} otherwise: it cannot be read block by block")
        return found

    def _load(self, module: nn.Module, names: list[str], prefix: str) -> None:
        for name in names:
            if prefix + name not in self.files:
                continue  # tied to another
            path, spelling = self.files[prefix + name]
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(spelling)
            if not bool(torch.isfinite(tensor).all()):
                raise BadInput(f"the weight {prefix}{name} holds NaN or infinite values")
            set_module_tensor_to_device(module, name, self._device, value=tensor, dtype=self.dtype)
