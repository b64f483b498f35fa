"""The dense model as conversion reads it: whole where it fits, else one block at a time from its safetensors files."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import psutil
import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilon_compress.errors import BadInput
from pilon_compress.models import checkpoint
from pilon_compress.models.blocks import blocks, passes
from pilon_compress.models.files import weight_files

log = logging.getLogger(__name__)

SHARE = 0.5  # of the memory: a float32 model that is larger than this is read block by block
RENAMED = {"lm_head.weight": "embed_out.weight"}  # what files of GPT-NeoX call it


class NotStreamable(BadInput):
    """The model cannot be read block by block, but it may be loaded whole."""


class Source:
    """A dense model and its transformer blocks, in memory. Raises BadInput for a weight that is NaN or infinite."""

    streamed = False

    def __init__(self, model: PreTrainedModel) -> None:
        self._adopt(model)
        checkpoint.check_finite(model)

    def _adopt(self, model: PreTrainedModel) -> None:
        """Find the blocks of `model`."""
        self.model = model
        self.names = passes(model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights, for as long as the context lasts."""
        yield self.model.base_model.get_submodule(self.names[index])

    def reading(self) -> AbstractContextManager[None]:
        """A context in which the model itself may be run: every block has its weights when it is called."""
        return nullcontext()

    def parameters(self) -> Iterator[Tensor]:
        """Every weight once, those outside the blocks first: the same order whether streamed or not."""
        for _, parameter in self._outside():
            yield parameter
        for index in range(len(self.names)):
            with self.block(index) as block:
                yield from block.parameters()

    def _outside(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that lie in no block, by name; tied ones once."""
        inside = tuple(f"{self._prefix()}{name}." for name in self.names)
        return [(name, one) for name, one in self.model.named_parameters() if not name.startswith(inside)]

    def _prefix(self) -> str:
        model = self.model
        return "" if model.base_model is model else f"{model.base_model_prefix}."


class Streamed(Source):
    """A dense model with every block on the meta device until it is asked for: memory for one block, not for all.

    Weights come as `dtype` on `device`. Raises NotStreamable where the folder's tensors are not named as the model's,
    which transformers would have to convert; such a model must be loaded whole.
    """

    streamed = True

    def __init__(self, reference: str, dtype: torch.dtype, device: torch.device) -> None:
        folder = Path(checkpoint.resolve(reference))
        if not folder.is_dir():
            raise NotStreamable(f"{reference} is not a local folder: only those can be read block by block")
        config = checkpoint.load_config(reference)
        config.dtype = dtype
        with init_empty_weights(include_buffers=False):
            model = checkpoint.build(config)
        self._adopt(model.eval().requires_grad_(False))
        self.dtype, self._device = dtype, device
        self.files = self._locate(folder)
        self._load(model, [name for name, _ in self._outside()], "")
        model.tie_weights()
        if missing := [name for name, parameter in self._outside() if parameter.is_meta]:
            raise NotStreamable(f"{folder} does not hold {missing[0]}: it cannot be read block by block")
        for name, buffer in model.named_buffers():
            set_module_tensor_to_device(model, name, device, value=buffer)

    @property
    def device(self) -> torch.device:
        return self._device

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        module = self.model.base_model.get_submodule(self.names[index])
        self._fill(module, index)
        try:
            yield module
        finally:
            self._empty(module)

    @contextmanager
    def reading(self) -> Iterator[None]:
        handles = []
        for index, module in enumerate(blocks(self.model).values()):

            def before(module: nn.Module, _args: object, index: int = index) -> None:
                self._fill(module, index)

            def after(module: nn.Module, _args: object, _output: object) -> None:
                self._empty(module)

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _fill(self, block: nn.Module, index: int) -> None:
        names = [name for name, _ in block.named_parameters()]
        self._load(block, names, f"{self._prefix()}{self.names[index]}.")

    def _empty(self, block: nn.Module) -> None:
        for name, _ in list(block.named_parameters()):  # buffers stay: no file holds those that are computed
            set_module_tensor_to_device(block, name, "meta")

    def _locate(self, folder: Path) -> dict[str, tuple[Path, str]]:
        """Parameter name -> the file that holds it and its name there, with or without the base model's prefix."""
        stored: dict[str, tuple[Path, list[int]]] = {}
        for path in weight_files(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    stored |= {key: (path, file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise BadInput(f"{path} is truncated or corrupt: {error}") from error
        found, prefix = {}, f"{self.model.base_model_prefix}."
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        for name, parameter in self.model.named_parameters():
            spellings = (name, name.removeprefix(prefix), prefix + name, RENAMED.get(name, name))
            spelling = next((one for one in spellings if one in stored), None)
            if spelling is not None and stored[spelling][1] == list(parameter.shape):
                found[name] = (stored[spelling][0], spelling)
            elif name not in tied:
                raise NotStreamable(f"{folder} names {name} otherwise: it cannot be read block by block")
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
            # a copy: products of memory that the file happens to align otherwise round otherwise
            tensor = tensor.to(self.dtype, copy=True)
            set_module_tensor_to_device(module, name, self._device, value=tensor, dtype=self.dtype)


def open_source(
    reference: str, parameters: int, dtype: torch.dtype, device: torch.device, limit: float | None
) -> Source:
    """The dense model whole, or streamed where in float32 it fills more than half of the memory (`limit` in GiB).

    Without a limit it is what the machine has to spare. A model that cannot be streamed is loaded whole.
    """
    if is_streamed(reference, parameters, limit):
        try:
            return Streamed(reference, dtype, device)
        except NotStreamable as error:
            log.warning("loading the whole model: %s", error)
    return Source(checkpoint.load_model(reference, dtype=dtype, device=str(device)))


def is_streamed(reference: str, parameters: int, limit: float | None) -> bool:
    """Whether a model of so many numbers is to be read block by block."""
    return 4 * parameters > SHARE * available(limit) and Path(checkpoint.resolve(reference)).is_dir()


def available(limit: float | None) -> float:
    """Bytes that a conversion may use: `limit` in GiB, or what the machine has to spare."""
    return psutil.virtual_memory().available if limit is None else limit * 2**30
