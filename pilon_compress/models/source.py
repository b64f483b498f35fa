"""Give conversion the blocks of a dense model: all in memory where it fits, else one at a time from safetensors."""

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
from pilon_compress.models.in_memory import held_model

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.5  # a float32 model that takes more than this share of the memory is read block by block
RENAMED = {"lm_head.weight": "embed_out.weight"}  # the name in files of GPT-NeoX


class NotStreamable(BadInput):
    """Raised for a model that cannot be read block by block, but may still be loaded completely."""


class Source:
    """A dense model and its transformer blocks in memory; parameters may be on the meta device."""

    streamed = False

    def __init__(self, model: PreTrainedModel, check: bool = True) -> None:
        """Take `model` as it is; `names` are its blocks in the order in which they run.

        With `check`, raises BadInput for a weight that is NaN or infinite.
        """
        self.model = model
        self.names = passes(model)
        if check:
            checkpoint.check_finite(model)

    @property
    def device(self) -> torch.device:
        """Return the device that the blocks compute on."""
        return self.model.device

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Yield block `index` with its weights loaded for the duration of the context."""
        yield self.model.base_model.get_submodule(self.names[index])

    def reading(self) -> AbstractContextManager[None]:
        """Return a context in which the model may be called: every block then has its weights when it runs."""
        return nullcontext()

    def parameters(self) -> Iterator[Tensor]:
        """Yield every weight once, those outside the blocks first; the order does not depend on streaming."""
        for _, parameter in self._outside():
            yield parameter
        for index in range(len(self.names)):
            with self.block(index) as block:
                yield from block.parameters()

    def _outside(self) -> list[tuple[str, nn.Parameter]]:
        """Return name and parameter of all that lie in no block; tied ones once."""
        inside = tuple(f"{self._prefix()}{name}." for name in self.names)
        return [(name, one) for name, one in self.model.named_parameters() if not name.startswith(inside)]

    def _prefix(self) -> str:
        model = self.model
        return "" if model.base_model is model else f"{model.base_model_prefix}."


class Streamed(Source):
    """A dense model whose blocks stay on the meta device until they are used: memory for one block, not for all."""

    streamed = True

    def __init__(self, reference: str, dtype: torch.dtype, device: torch.device) -> None:
        """Build the model of a local folder without blocks; weights are loaded as `dtype` on `device`.

        Raises NotStreamable where the folder's tensors have other names than the model's, which transformers would have
        to convert; such a model must be loaded completely.
        """
        folder = Path(checkpoint.resolve(reference))
        if not folder.is_dir():
            raise NotStreamable(f"{reference} is not a local folder: only those can be read block by block")
        config = checkpoint.load_config(reference)
        config.dtype = dtype
        with init_empty_weights(include_buffers=False):
            model = checkpoint.build(config)
        super().__init__(model.eval().requires_grad_(False), check=False)
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
        """Return the device that the blocks compute on."""
        return self._device

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Yield block `index`; its weights are read on entry and freed on exit."""
        module = self.model.base_model.get_submodule(self.names[index])
        self._fill(module, index)
        try:
            yield module
        finally:
            self._empty(module)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Load every block's weights when it is called, and free them when it has run."""
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
        for name, _ in list(block.named_parameters()):  # buffers stay: files do not hold computed ones
            set_module_tensor_to_device(block, name, "meta")

    def _locate(self, folder: Path) -> dict[str, tuple[Path, str]]:
        """Return parameter name -> (file, name there), which may lack the base model prefix. Raises NotStreamable."""
        stored: dict[str, tuple[Path, list[int]]] = {}
        for path in weight_files(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    stored |= {key: (path, file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise BadInput(f"{path} is truncated or corrupt: {error}") from error
        located, prefix = {}, f"{self.model.base_model_prefix}."
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        for name, parameter in self.model.named_parameters():
            spellings = (name, name.removeprefix(prefix), prefix + name, RENAMED.get(name, name))
            spelling = next((one for one in spellings if one in stored), None)
            if spelling is not None and stored[spelling][1] == list(parameter.shape):
                located[name] = (stored[spelling][0], spelling)
            elif name not in tied:
                raise NotStreamable(f"{folder} names {name} otherwise: it cannot be read block by block")
        return located

    def _load(self, module: nn.Module, names: list[str], prefix: str) -> None:
        for name in names:
            if prefix + name not in self.files:
                continue  # tied to another
            path, spelling = self.files[prefix + name]
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(spelling)
            if not bool(torch.isfinite(tensor).all()):
                raise BadInput(f"the weight {prefix}{name} holds NaN or infinite values")
            # a copy, since matrix products round differently when the file's memory is aligned differently
            tensor = tensor.to(self.dtype, copy=True)
            set_module_tensor_to_device(module, name, self._device, value=tensor, dtype=self.dtype)


def open_source(
    reference: str, parameters: int, dtype: torch.dtype, device: torch.device, limit: float | None
) -> Source:
    """Load the dense model completely, or stream it where in float32 it takes more than half of the memory.

    The memory is `limit` (GiB), or what the machine has available. A model that cannot be streamed is loaded
    completely, and stderr says why. Raises BadInput for a model that does not load.
    """
    if is_streamed(reference, parameters, limit):
        try:
            return Streamed(reference, dtype, device)
        except NotStreamable as error:
            log.warning("loading the whole model: %s", error)
    return Source(checkpoint.load_model(reference, dtype=dtype, device=str(device), share=True))


def is_streamed(reference: str, parameters: int, limit: float | None) -> bool:
    """Return True if a model of so many parameters is read block by block; `limit` in GiB."""
    if held_model(reference) is not None:
        return False
    return 4 * parameters > MEMORY_SHARE * available(limit) and Path(checkpoint.resolve(reference)).is_dir()


def available(limit: float | None) -> float:
    """Return the bytes that a conversion may use: `limit` (GiB), or what the machine has available."""
    return psutil.virtual_memory().available if limit is None else limit * 2**30
