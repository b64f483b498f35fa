"""Choose the type of every tensor of a GGUF file, and round numbers to it."""

import ctypes
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from transformers import PreTrainedModel

from pilon_compress.errors import BadInput
from pilon_compress.export.integers import Integers
from pilon_compress.export.llama_cpp.architectures import Architecture, lies_transposed, rotary_factors, turned

Type = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m", "tq1_0", "tq2_0"]
TYPES: tuple[Type, ...] = get_args(Type)
SMALL = 32  # numbers of a block of q8_0 and q4_0
LARGE = 256  # of q4_k, q6_k, tq1_0 and tq2_0
FALLBACKS = {
    "Q4_K": "Q5_0",
    "Q6_K": "Q8_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
}  # for rows that are no multiple of LARGE, as in llama.cpp
WHOLE = ("position_embd.weight", "token_types.weight", "rope_freqs.weight")  # looked up or divided by, in float32
UNREAD = ("pooler.",)  # parts of an encoder behind the last states, which embeddings do not read


class Written(NamedTuple):
    """A tensor of the file: its name, its bytes as an array, and the type of its numbers, by its name in gguf."""

    name: str
    data: np.ndarray
    kind: str


class _Place(NamedTuple):
    """A tensor of the model on its way to the file: its own name, value and place there, its type, and its integers.

    known: what the conversion rounded it to, where the type holds these numbers
    """

    source: str
    value: torch.Tensor
    name: str
    kind: str
    known: Integers | None


def _places(
    model: PreTrainedModel, arch: Architecture, kind: Type, layers: int, integers: Mapping[str, Integers]
) -> Iterator[_Place]:
    """Yield the model's tensors that the file gets. Raises BadInput for one that it has no place for."""
    import gguf

    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch.name), layers)
    tied = bool(model.config.tie_word_embeddings)
    for source, value in model.state_dict().items():
        if (tied and source == "lm_head.weight") or source.startswith(UNREAD):
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise BadInput(f"llama.cpp's architecture {arch.name} has no place for {source}: take another form")
        shape = tuple(reversed(value.shape)) if lies_transposed(source, value, arch.name) else tuple(value.shape)
        chosen, known = kind_of(name, shape, kind, layers), integers.get(source.removesuffix(".weight"))
        yield _Place(source, value, name, chosen, known if known is not None and fits(known, chosen) else None)


def tensors(
    model: PreTrainedModel, arch: Architecture, kind: Type, layers: int, integers: Mapping[str, Integers]
) -> Iterator[Written]:
    """Yield the tensors of a plain model, rounded to `kind`, in the file's order and names.

    integers: matrices that have been rounded, by layer; where `kind` holds their numbers, they are written as they are
    Raises BadInput for a tensor that llama.cpp's architecture has no place for.
    """
    factors = rotary_factors(model)
    if factors is not None:
        yield Written("rope_freqs.weight", factors.numpy(), "F32")
    for one in _places(model, arch, kind, layers, integers):
        if one.known is not None:
            codes, scale = (
                turned(one.source, part, model.config, arch.name) for part in (one.known.codes, one.known.scale)
            )
            yield Written(one.name, blocks(codes, scale, one.kind), one.kind)
        else:
            weight = turned(one.source, one.value, model.config, arch.name).float().cpu().contiguous().numpy()
            yield Written(one.name, rounded(weight, one.kind), one.kind)


@torch.no_grad()
def round_as_written(
    model: PreTrainedModel, arch: Architecture, kind: Type, layers: int, integers: Mapping[str, Integers]
) -> None:
    """Round the weights of a plain model, in place, to the numbers that `tensors` writes.

    Blocks lie along rows, whose order `turned` may change, so that weights are rounded in their own order: a file in a
    wrong order computes something else than this model.
    """
    import gguf

    for one in _places(model, arch, kind, layers, integers):
        if one.known is None:
            rows = one.value.T if lies_transposed(one.source, one.value, arch.name) else one.value
            data = rounded(rows.float().cpu().contiguous().numpy(), one.kind)
            back = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[one.kind])
            rows.copy_(torch.from_numpy(np.ascontiguousarray(back, np.float32)).view(rows.shape))


def fits(known: Integers, kind: str) -> bool:
    """Return True if the blocks of `kind` hold the integers and scales of a matrix exactly."""
    shared = known.group or known.codes.shape[1]
    tiny = torch.finfo(torch.float16).smallest_normal
    scale = known.scale.float().abs()
    whole = shared % SMALL == 0 and known.codes.shape[1] % shared == 0
    within = bool((scale >= tiny).all() and (scale <= torch.finfo(torch.float16).max).all())
    return whole and within and {"Q4_0": 4, "Q8_0": 8}.get(kind) == known.bits


def blocks(codes: torch.Tensor, scale: torch.Tensor, kind: str) -> np.ndarray:
    """Return codes (rows, numbers) int8 and scales (rows, groups) as rows of bytes: a scale in f16, 32 numbers."""
    rows, count = codes.shape[0], codes.shape[1] // SMALL
    numbers = codes.reshape(rows, count, SMALL).numpy()
    each = scale.float().repeat_interleave(count // scale.shape[1], 1).half().numpy().reshape(rows, count, 1)
    if kind == "Q4_0":
        fields = (numbers + 8).astype(np.uint8)
        data = fields[..., : SMALL // 2] | fields[..., SMALL // 2 :] << 4
    else:
        data = numbers.view(np.uint8)
    return np.concatenate([each.view(np.uint8), data], -1).reshape(rows, -1)


def kind_of(name: str, shape: tuple[int, ...], asked: Type, layers: int) -> str:
    """Return the type of a tensor: that which is asked for, or the next that its rows fill."""
    if len(shape) < 2 or name in WHOLE:
        return "F32"
    row, head = shape[-1], name in ("token_embd.weight", "output.weight")
    if asked == "q4_k_m":
        layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
        careful = head or (("attn_v" in name or "ffn_down" in name) and _more_bits(layer, layers))
        found = "Q6_K" if careful else "Q4_K"
        found = found if row % LARGE == 0 else FALLBACKS[found]
    elif asked in ("tq1_0", "tq2_0"):
        found = "Q6_K" if head else asked.upper()
        found = found if row % LARGE == 0 else FALLBACKS[found]
    else:
        found = "Q8_0" if asked == "q4_0" and head else asked.upper()
    return found if not found.startswith("Q") or row % SMALL == 0 else "F16"


def _more_bits(layer: int, layers: int) -> bool:
    """Return True for layers that a medium mixture keeps in six bits: an eighth at either end, a third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def rounded(weight: np.ndarray, kind: str) -> np.ndarray:
    """Return `weight` (…, numbers of a row), float32, in the type `kind`: numbers, or rows of bytes."""
    import gguf

    if kind == "F32":
        return weight
    if kind == "F16":
        if not np.isfinite(weight.astype(np.float16)).all():
            raise BadInput("a weight is too large for f16: take --type bf16 or q8_0")
        return weight.astype(np.float16)
    if kind.endswith("_K"):
        return by_ggml(weight, gguf.GGMLQuantizationType[kind])
    return gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])


@cache
def _ggml() -> Any:
    """Load ggml, which the wheel xllamacpp holds."""
    found = find_spec("xllamacpp")
    assert found is not None and found.submodule_search_locations
    (path,) = Path(next(iter(found.submodule_search_locations))).glob("xllamacpp*.so")
    library = ctypes.PyDLL(str(path))
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    return library


def by_ggml(weight: np.ndarray, kind: Any) -> np.ndarray:
    """Round `weight` (rows, numbers) by llama.cpp's own code, without an importance matrix."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, numbers = weight.shape
    made = np.zeros((rows, numbers // block * size), np.uint8)
    source = np.ascontiguousarray(weight, np.float32)
    pointers = (source.ctypes.data_as(ctypes.c_void_p), made.ctypes.data_as(ctypes.c_void_p))
    _ggml().ggml_quantize_init(int(kind))
    done = _ggml().ggml_quantize_chunk(int(kind), *pointers, 0, rows, numbers, None)
    assert done == made.nbytes, (done, made.nbytes)
    return made
