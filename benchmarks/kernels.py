"""Measure a GPU's ceilings, the kernels' exactness on it, and their time beside dense; prints a short table last.

PYTHONPATH=. python3 benchmarks/kernels.py ceilings        bandwidths, launches, matrix products
PYTHONPATH=. python3 benchmarks/kernels.py exact           every kernel, every packed layer against the CPU
PYTHONPATH=. python3 benchmarks/kernels.py ffn             feed-forward blocks against dense bfloat16, in CUDA graphs
PYTHONPATH=. python3 benchmarks/kernels.py exact --smoke   seconds, on a CPU; the times mean nothing there
"""

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Rows = dict[str, Any]
L2 = 128 * 10**6  # bytes of weights in all timed layers: more than a cache holds


def seconds(calls: list[Callable[[], Any]], device: str, repeats: int = 20) -> float:
    """Return the median seconds of one of `calls`, which run one after another; on a GPU as one CUDA graph."""
    for call in calls[:2]:
        call()
    if device == "cpu":
        started = time.perf_counter()
        calls[0]()
        return time.perf_counter() - started
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 4)]
    for mark in marks:
        mark.record()
        graph.replay()
    torch.cuda.synchronize()
    gaps = sorted(a.elapsed_time(b) for a, b in zip(marks[3:-1], marks[4:], strict=True))
    return gaps[len(gaps) // 2] / 1000 / len(calls)


def micro(value: float) -> str:
    """Format seconds in microseconds."""
    return f"{value * 1e6:.2f} us"


def copies(size: int, device: str) -> int:
    """Return the number of layers of `size` bytes to time in turn, so that none is in a cache."""
    return 1 if device == "cpu" else min(1024, max(2, L2 // size))


def ceilings(device: str, smoke: bool) -> Rows:
    """Measure read bandwidth, dependent launches, matrix-vector products, and int8 beside bfloat16 products."""
    rows: Rows = {}
    normal = partial(torch.randn, device=device, dtype=torch.bfloat16)
    for megabytes in (1,) if smoke else (4, 20, 40, 400):
        buffer = torch.zeros(megabytes * 250_000, device=device)
        rows[f"read {megabytes} MB, again and again"] = (
            f"{megabytes / 1000 / seconds([buffer.sum] * 8, device):.0f} GB/s"
        )
    one = torch.zeros(1, device=device)
    rows["a kernel that waits for the one before"] = micro(seconds([partial(one.add_, 1)] * 1000, device))
    for d, ff in ((64, 128),) if smoke else ((512, 2048), (1024, 4096), (4096, 11008)):
        x, matrices = normal(d), [normal(ff, d) for _ in range(copies(2 * d * ff, device))]
        rows[f"mv bfloat16 {d} x {ff}"] = micro(seconds([partial(torch.mv, w, x) for w in matrices], device))
    for tokens in (32,) if smoke else (512, 2048, 16384):
        for K, N in ((64, 32),) if smoke else ((512, 384), (384, 2048), (4096, 1024), (1024, 11008)):
            x, w = normal(tokens, K), normal(N, K)
            codes, digits = x.clamp(-1, 1).to(torch.int8), w.clamp(-1, 1).to(torch.int8)
            whole = seconds([partial(torch._int_mm, codes, digits.T)] * 8, device)
            narrow = seconds([partial(torch.mm, x, w.T)] * 8, device)
            rows[f"mm {tokens} x {K} x {N}"] = f"int8 {micro(whole)}, bfloat16 {micro(narrow)}, {narrow / whole:.2f}x"
    return rows


def drawn(d_in: int, d_out: int, rank: int, top_k: int, full: bool, seed: int) -> tuple[Any, ...]:
    """Return random ternary A and B, selected, scale, shift and bias of a projection, on the CPU."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((top_k, d_in, rank), (top_k, rank, d_out))
    A, B = (torch.randint(-1, 2, shape, generator=draw, dtype=torch.int8) for shape in shapes)
    scale = torch.randn(top_k * rank, generator=draw) * (2 / d_in) ** 0.5 / (top_k * rank) ** 0.5
    shift, bias = (0.1 * torch.randn(size, generator=draw) if full else None for size in (top_k * rank, d_out))
    return A, B, torch.randperm(top_k, generator=draw), scale, shift, bias


def placed(parts: tuple[Any, ...], device: str) -> Any:
    """Return the tensors of `drawn` packed for the GPU kernels on `device`."""
    from pilon_compress.kernels import gpu

    return gpu.GpuProjection(
        gpu.words(*parts[:2]).to(device), *(None if part is None else part.to(device) for part in parts[2:])
    )


def apart(actual: Tensor, expected: Tensor) -> str:
    """Describe how many values differ, and the largest difference."""
    difference = (actual.cpu() - expected).abs()
    worst = (difference.max() / expected.abs().max()).item()
    return f"{int((difference > 0).sum())} of {expected.numel()} differ, by {worst:.1e} of the largest"


def exact(device: str, smoke: bool) -> Rows:
    """Count outputs that differ from plain torch on the CPU; with relu2 none should, in any kernel."""
    rows: Rows = {}
    for d, ff, rank, top_k in ((64, 144, 16, 2),) if smoke else ((512, 2048, 32, 8), (1000, 4096, 48, 8)):
        shapes = ((d, ff), (d, ff), (ff, d))
        sides = [drawn(*shape, rank, top_k, seed > 0, seed) for seed, shape in enumerate(shapes)]
        for tokens in (1, 17) if smoke else (1, 16, 17, 65, 600):
            x = torch.randn(tokens, d, generator=torch.Generator().manual_seed(tokens))
            rows |= {f"{tokens} x {d}, {ff}: {name}": value for name, value in exact_block(x, sides, device)}
    return rows | dict(exact_layers(device))


def exact_block(x: Tensor, sides: list[tuple[Any, ...]], device: str) -> Iterator[tuple[str, str]]:
    """Yield the differences of a projection and of blocks by every number of launches."""
    from pilon_compress.kernels import gpu, reference, triton_launch

    gate, up, down = (placed(parts, device) for parts in sides)
    there, small = x.to(device), triton_launch.SMALL
    expected = reference.compose(x, *sides[1], 128)
    yield "projection in groups", apart(gpu.compose(there, *up, 128), expected)
    y_gate, y_up = (reference.compose(x, *parts) for parts in sides[:2])
    for act in ("relu2", "silu"):
        expected = reference.compose(reference.ACTIVATIONS[act](y_gate) * y_up, *sides[2], 128)
        for limit in (0, 1 << 30) if len(x) <= triton_launch.FEW else (0,):
            triton_launch.SMALL = limit
            name = f"block, {act}, {gpu.launches(len(x), gate, up) or 'many'} launches"
            yield name, apart(gpu.ffn(there, up, down, gate, act), expected)
        triton_launch.SMALL = small
    if device != "cpu":
        block = partial(gpu.ffn, up=up, down=down, gate=gate)
        yield "torch.compile against eager", apart(torch.compile(block, fullgraph=True)(there), block(there).cpu())


def exact_layers(device: str) -> Iterator[tuple[str, str]]:
    """Yield the differences of packed layers on the device from the same layers on the CPU."""
    from pilon_compress.kernels import dispatch
    from pilon_compress.nn.composed_linear import ComposedLinear
    from pilon_compress.nn.formats.packed_ternary import PackedBank, PackedLinear
    from pilon_compress.nn.int8 import Int8Linear
    from pilon_compress.nn.ternary_codec import pack

    torch.manual_seed(0)
    bank = PackedBank(200, 96, 3, 16, "base3")
    bank.A_codes, bank.B_codes = (pack(torch.randint(-1, 2, shape), "base3") for shape in ((3, 200, 16), (3, 16, 96)))
    matrix, rest = PackedLinear(200, 96, False, (200, 96), "2bit", group=128), Int8Linear(200, 90, False)
    matrix.codes = pack(torch.randint(-1, 2, (1, 200, 96)), "2bit")
    rest.weight.random_(-127, 128)
    layers = torch.nn.ModuleDict(
        {"composed": ComposedLinear(bank, 2, False, group=128), "matrix": matrix, "8 bits": rest}
    )
    for scale in (layers["composed"].weight, matrix.weight, rest.scale):
        scale.normal_()
    batches = [torch.randn(tokens, 200).to(dtype) for tokens in (1, 17) for dtype in (torch.float32, torch.bfloat16)]
    before = [{name: layer(x) for name, layer in layers.items()} for x in batches]
    dispatch.TRITON.add(device)
    layers["bank"] = bank  # the first layer only refers to it, so that it must move as part of the model
    moved = copy.deepcopy(layers).to(device)  # a copy, in which nothing is unpacked yet
    for x, expected in zip(batches, before, strict=True):
        for name, y in expected.items():
            yield f"packed, {len(x)} in {str(x.dtype)[6:]}: {name}", apart(moved[name](x.to(device)), y)
    forms = type(moved["bank"]._unpacked[128].value.digits).__name__, type(moved["matrix"]._unpacked.value).__name__
    yield "packed layers are computed as", ", ".join(forms)


def ffn(device: str, smoke: bool) -> Rows:
    """Time one layer among many: dense bfloat16, PILON bfloat16 with two GEMMs per projection, PILON ternary."""
    rows: Rows = {}
    sizes = ((32, 64, False),) if smoke else ((512, 2048, False), (1024, 4096, False), (4096, 11008, True))
    for d, ff, gated in sizes:
        shapes = [(d, ff)] * (1 + gated) + [(ff, d)]
        batches = [torch.randn(tokens, d, device=device).bfloat16() for tokens in ((1,) if smoke else (1, 16, 512))]
        dense = plain_layers([shape[::-1] for shape in shapes], device)
        base = {}
        for x in batches:
            base[len(x)] = seconds([partial(plain, x, w, 1, gated) for w in dense], device)
            rows[f"{d}/{ff}, {len(x)} tokens: dense bfloat16"] = micro(base[len(x)])
        del dense
        for kr in (d // 2,) if smoke else (d // 4, d // 2):
            for x in batches:
                for name, taken in composed(x, shapes, kr, device):
                    ratio = f"{micro(taken)}, {base[len(x)] / taken:.2f}x"
                    rows[f"{d}/{ff}, {len(x)} tokens, k·r {kr}: {name}"] = ratio
    return rows


def composed(x: Tensor, shapes: list[tuple[int, int]], kr: int, device: str) -> Iterator[tuple[str, float]]:
    """Yield the seconds of a block of `shapes` with k·r latent values, by each implementation."""
    from pilon_compress.kernels import gpu, triton_launch

    gated, act = len(shapes) == 3, "silu" if len(shapes) == 3 else "relu2"
    narrow = plain_layers([pair for d_in, d_out in shapes for pair in ((kr, d_in), (d_out, kr))], device)
    yield "bfloat16", seconds([partial(plain, x, w, 2, gated) for w in narrow], device)
    del narrow
    rank = 32 if kr % 32 == 0 else 16
    projections = [placed(drawn(*shape, rank, kr // rank, False, seed), device) for seed, shape in enumerate(shapes)]
    layers = [[copied(part) for part in projections] for _ in range(copies(kr * sum(map(sum, shapes)) // 4, device))]
    calls = [partial(gpu.ffn, x, w[-2], w[-1], w[0] if gated else None, act) for w in layers]
    limits = triton_launch.SMALL, triton_launch.PREFILL
    if len(x) > triton_launch.FEW:
        ways = {"ternary, tiles": (0, 1 << 30), "ternary, _int_mm": (0, 0)}
    else:
        ways = {"ternary, 4 launches": (0, 0)} | ({"ternary, 2 launches": (1 << 30, 0)} if kr <= 512 else {})
    for name, (triton_launch.SMALL, triton_launch.PREFILL) in ways.items():
        yield name, seconds(calls, device)
    triton_launch.SMALL, triton_launch.PREFILL = limits


def plain_layers(shapes: list[tuple[int, int]], device: str) -> list[list[Tensor]]:
    """Return random bfloat16 matrices of `shapes` for as many layers as `copies` says."""
    count = copies(2 * sum(a * b for a, b in shapes), device)
    return [[torch.randn(b, a, device=device).bfloat16() / a**0.5 for b, a in shapes] for _ in range(count)]


def copied(projection: Any) -> Any:
    """Return a copy of the projection in memory of its own."""
    words = projection.words
    return projection._replace(words=words._replace(A=words.A.clone(), B=words.B.clone()))


def plain(x: Tensor, weights: list[Tensor], each: int, gated: bool) -> Tensor:
    """Compute a feed-forward block of `each` matrices per projection."""

    def through(x: Tensor, first: int) -> Tensor:
        for weight in weights[first * each : (first + 1) * each]:
            x = functional.linear(x, weight)
        return x

    h = functional.silu(through(x, 0)) * through(x, 1) if gated else torch.relu(through(x, 0)).square()
    return through(h, 1 + gated)


ARMS = {"ceilings": ceilings, "exact": exact, "ffn": ffn}


def main(words: list[str] | None = None) -> None:
    """Run one arm, and print its JSON and its table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--smoke", action="store_true", help="very small shapes, on the CPU in Triton's interpreter")
    options = parser.parse_args(words)
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("no GPU here: try the command on a CPU with --smoke")
    started = time.time()
    with torch.no_grad():
        rows = ARMS[options.arm]("cpu" if options.smoke else "cuda", options.smoke)
    rows["seconds, all of it"] = round(time.time() - started)
    rows["device"] = "cpu" if options.smoke else torch.cuda.get_device_name()
    import triton

    rows["versions"] = f"torch {torch.__version__}, triton {triton.__version__}"
    print(json.dumps({"arm": options.arm, **rows}))
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
