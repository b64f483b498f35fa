"""Build one feed-forward block with random weights in every variant of the benchmark.

To add one, write a function from `Shape` and device to `Block` and put it into `VARIANTS`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from pilon_compress.bench.timing import once
from pilon_compress.kernels import cpu, dispatch, reference
from pilon_compress.kernels.gpu_layout import MULTIPLE, MatrixWords
from pilon_compress.kernels.reference import ACTIVATIONS
from pilon_compress.nn.ternary_quantizer import GROUP

Linear = Callable[[Tensor], Tensor]
BASELINE = "dense_fp32"
WIDE_INPUTS = (
    16  # torch 2.13's int8 product of several rows reads behind inputs that are no multiple of it, and crashes
)


class Unavailable(Exception):
    """Raised where a variant does not run on this device; the message says why in a few words."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a block: width `d`, hidden width, and for PILON `active` (= k·r) components in primitives of `rank`."""

    d: int
    hidden: int
    active: int
    rank: int
    gated: bool
    activation: str
    batch: int

    @property
    def projections(self) -> list[tuple[int, int]]:
        """Return (d_in, d_out) of up, gate if there is one, and down."""
        wide = (self.d, self.hidden)
        return [wide, *([wide] if self.gated else []), (self.hidden, self.d)]


@dataclass(frozen=True)
class Block:
    """A function of inputs (batch, d) of `dtype`, and the bytes of weights that it reads in a pass."""

    run: Linear
    bytes: int
    dtype: torch.dtype = torch.float32


def dense_fp32(shape: Shape, device: torch.device) -> Block:
    """Return dense matrices in float32, the baseline."""
    return _dense(shape, device, torch.float32)


def dense_bf16(shape: Shape, device: torch.device) -> Block:
    """Return dense matrices in bfloat16."""
    return _dense(shape, device, torch.bfloat16)


def dense_int8(shape: Shape, device: torch.device) -> Block:
    """Return dense matrices in int8, by torch's faster product. Raises Unavailable without one."""
    parts = [[_weight(d_in, d_out, device)] for d_in, d_out in shape.projections]
    return _int8(shape, parts, device)


def dense_ternary(shape: Shape, device: torch.device) -> Block:
    """Return dense ternary matrices, by this package's kernels. Raises Unavailable where they do not run."""
    if device.type in dispatch.TRITON:
        return _ternary_matrices_on_gpu(shape, device)
    needs_kernel(device)
    return _ternary(shape, [ternary_matrix(*sizes) for sizes in shape.projections])


def pilon_fp32(shape: Shape, device: torch.device) -> Block:
    """Return two factors per projection in float32."""
    return _pilon(shape, device, torch.float32)


def pilon_bf16(shape: Shape, device: torch.device) -> Block:
    """Return two factors per projection in bfloat16."""
    return _pilon(shape, device, torch.bfloat16)


def pilon_int8(shape: Shape, device: torch.device) -> Block:
    """Return two factors per projection in int8, by torch's faster product. Raises Unavailable without one."""
    return _int8(shape, _factors(shape, device), device)


def pilon_ternary(shape: Shape, device: torch.device) -> Block:
    """Return a ternary bank per projection, by this package's kernels. Raises Unavailable where they do not run."""
    if device.type in dispatch.TRITON:
        return _ternary_banks_on_gpu(shape, device)
    needs_kernel(device)
    return _ternary(shape, [ternary_bank(*sizes, shape.active, shape.rank) for sizes in shape.projections])


VARIANTS: dict[str, Callable[[Shape, torch.device], Block]] = {
    function.__name__: function
    for function in (
        *(dense_fp32, dense_bf16, dense_int8, dense_ternary),
        *(pilon_fp32, pilon_bf16, pilon_int8, pilon_ternary),
    )
}


def _weight(d_in: int, d_out: int, device: torch.device) -> Tensor:
    return torch.randn(d_out, d_in, device=device) * d_in**-0.5


def _factors(shape: Shape, device: torch.device) -> list[list[Tensor]]:
    """Return A (k·r, d_in) and B (d_out, k·r) of every projection, with the composition folded in."""
    sizes = shape.projections
    return [[_weight(i, shape.active, device), _weight(shape.active, o, device)] for i, o in sizes]


def _dense(shape: Shape, device: torch.device, dtype: torch.dtype) -> Block:
    parts = [[_weight(d_in, d_out, device)] for d_in, d_out in shape.projections]
    return _plain(shape, parts, dtype)


def _pilon(shape: Shape, device: torch.device, dtype: torch.dtype) -> Block:
    return _plain(shape, _factors(shape, device), dtype)


def _plain(shape: Shape, parts: list[list[Tensor]], dtype: torch.dtype) -> Block:
    parts = [[weight.to(dtype) for weight in part] for part in parts]
    return Block(_block(shape, [_chain([_matrix(w) for w in part]) for part in parts]), _bytes(parts), dtype)


def _int8(shape: Shape, parts: list[list[Tensor]], device: torch.device) -> Block:
    make, dtype = _faster_int8(shape, len(parts[0]), device)
    size = sum(weight.numel() + 4 * len(weight) for part in parts for weight in part)
    return Block(_block(shape, [_chain([make(w) for w in part]) for part in parts]), size, dtype)


@cache
def _faster_int8(shape: Shape, factors: int, device: torch.device) -> tuple[Callable[[Tensor], Linear], torch.dtype]:
    """Return torch's faster int8 product for this shape, and the dtype of its inputs. Raises Unavailable."""
    parts = [[_weight(*sizes, device)] for sizes in shape.projections] if factors == 1 else _factors(shape, device)
    products, reason = [], ""
    for make, dtype in ((weight_only_int8, torch.bfloat16), (dynamic_int8, torch.float32)):
        x = torch.randn(shape.batch, shape.d, device=device, dtype=dtype)
        try:
            run = _block(shape, [_chain([make(w) for w in part]) for part in parts])
            products.append((min(once(partial(run, x), device) for _ in range(8)), make, dtype))
        except RuntimeError as error:  # raised where a device or a build of torch lacks the operator
            reason = str(error).splitlines()[0]
    if not products:
        raise Unavailable(f"torch has no int8 product here: {reason}")
    return min(products, key=lambda product: product[0])[1:]


def _ternary(shape: Shape, projections: list[cpu.CpuProjection]) -> Block:
    up, *gate, down = projections
    activation = shape.activation
    stored = [tensor for p in projections for tensor in p.tensors() if tensor is not None]
    return Block(cpu.prepared_ffn(up, down, gate[0] if gate else None, activation), _bytes([stored]))


def _ternary_matrices_on_gpu(shape: Shape, device: torch.device) -> Block:
    runs, stored = [], []
    for d_in, d_out in shape.projections:
        matrix = dispatch.matrix(_ternary_weights(d_in, d_out).to(device), _group(d_in, d_out))
        if not isinstance(matrix, MatrixWords):
            raise Unavailable("the Triton kernels do not run here, or take no such shape")
        scale = torch.rand(d_out, device=device)
        runs.append(dispatch.multiplied(matrix, scale, _group(d_in, d_out)))
        stored.append([matrix.A, scale])
    return Block(_block(shape, runs), _bytes(stored), torch.bfloat16)


def _ternary_banks_on_gpu(shape: Shape, device: torch.device) -> Block:
    if not dispatch.available(device.type):
        raise Unavailable("the Triton kernels do not run here")
    from pilon_compress.kernels import gpu

    projections, k = [], shape.active // shape.rank
    k, rank = (1, shape.active) if shape.rank % MULTIPLE else (k, shape.rank)  # odd ranks run side by side
    for d_in, d_out in shape.projections:
        factors = (_ternary_weights(k, *sizes).to(device) for sizes in ((d_in, rank), (rank, d_out)))
        words = gpu.words(*dispatch.pad_bank(*factors))
        scale = dispatch.widened(torch.rand(shape.active, device=device), k, words.A.shape[2])
        projections.append(gpu.GpuProjection(words, torch.randperm(k, device=device), scale))
    up, *gate, down = projections
    run = partial(gpu.ffn, up=up, down=down, gate=gate[0] if gate else None, activation=shape.activation)
    return Block(run, _bytes([[p.words.A, p.words.B, p.selected, p.scale] for p in projections]), torch.bfloat16)


def ternary_matrix(d_in: int, d_out: int) -> cpu.CpuProjection:
    """Return a dense projection of random ternary weights and scales."""
    tiles = cpu.matrix_tiles(_ternary_weights(d_in, d_out))
    return cpu.CpuProjection(tiles, torch.rand(d_out), group=_group(d_in, d_out))


def ternary_bank(d_in: int, d_out: int, active: int, rank: int, n_primitives: int | None = None) -> cpu.CpuProjection:
    """Return a projection through a bank of random ternary weights and scales, with `active` components selected."""
    if rank % MULTIPLE:  # primitives of odd ranks run side by side
        rank, n_primitives = active, 1
    k = active // rank
    n = n_primitives or k
    tiles = cpu.tiles(*dispatch.pad_bank(_ternary_weights(n, d_in, rank), _ternary_weights(n, rank, d_out)))
    scale = dispatch.widened(torch.rand(active), k, tiles.rank)
    return cpu.CpuProjection(tiles, scale, torch.randperm(n)[:k], group=_group(d_in, d_out))


def _group(d_in: int, d_out: int) -> int:
    """Return the group size of the inputs: GROUP for the hidden values of a down projection, else 0."""
    return GROUP if d_in > d_out else 0


def _ternary_weights(*sizes: int) -> Tensor:
    return torch.randint(-1, 2, sizes, dtype=torch.int8)


def weight_only_int8(weight: Tensor) -> Linear:
    """Return a linear of int8 weights, from `weight` (d_out, d_in), and bfloat16 activations."""
    rows, scale = reference.int8_rows(weight)
    scale = scale.bfloat16()
    missing = -weight.shape[1] % WIDE_INPUTS
    if not missing:
        return lambda x: torch._weight_int8pack_mm(x, rows, scale)
    rows = pad(rows, (0, missing))
    return lambda x: torch._weight_int8pack_mm(pad(x, (0, missing)), rows, scale)


def dynamic_int8(weight: Tensor) -> Linear:
    """Return a linear of int8 weights, from `weight` (d_out, d_in), and int8 activations."""
    scale = reference.int8_rows(weight)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates these dtypes, but has nothing else as fast
        quantised = torch.quantize_per_channel(weight, scale, torch.zeros(len(scale), dtype=torch.long), 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(quantised, None)
    # activations of 7 bits, as in torch's own layer: without VNNI, sums of 8-bit products saturate
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, True)


def _matrix(weight: Tensor) -> Linear:
    return lambda x: linear(x, weight)


def _chain(linears: list[Linear]) -> Linear:
    first, *rest = linears
    if not rest:
        return first
    (second,) = rest
    return lambda x: second(first(x))


def _block(shape: Shape, linears: list[Linear]) -> Linear:
    up, *gate, down = linears
    act = ACTIVATIONS[shape.activation]
    if gate:
        return lambda x: down(act(gate[0](x)) * up(x))
    return lambda x: down(act(up(x)))


def _bytes(parts: list[list[Tensor]]) -> int:
    return sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part)


def needs_kernel(device: torch.device) -> None:
    """Raise Unavailable where the CPU's ternary kernel does not run."""
    if device.type != "cpu":
        raise Unavailable("the ternary kernel runs on CPUs only")
    if not cpu.available():
        raise Unavailable("the ternary kernel is unavailable (see the warning above)")
