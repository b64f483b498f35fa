"""Time one feed-forward block, dense and PILON in every number format; needs no model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pilon_compress.bench.block_variants import BASELINE, VARIANTS, Block, Shape, Unavailable
from pilon_compress.bench.timing import bandwidth, interleaved
from pilon_compress.config.benchmark import BenchConfig
from pilon_compress.errors import BadInput
from pilon_compress.kernels import cpu, dispatch
from pilon_compress.models.checkpoint import find_device
from pilon_compress.nn.ternary_quantizer import GROUP
from pilon_compress.results.benchmark import Benchmark, BlockShape, Timing

PASS_BYTES = 256 * 2**20  # dense weights of all copies of a block that a pass runs through: more than caches hold


def block_shape(config: BenchConfig) -> Shape:
    """Return the shape of the block in `config`, whose `ffn` is WIDTHxHIDDEN."""
    d, hidden = map(int, str(config.ffn).split("x"))
    rank = config.rank
    active = config.top_k * rank if config.top_k is not None else config.active_rank or max(rank, d // 4 // rank * rank)
    return Shape(
        d, hidden, active, rank, config.gated, config.activation or ("silu" if config.gated else "relu2"), config.batch
    )


@torch.inference_mode()
def bench_block(config: BenchConfig) -> Benchmark:
    """Time all variants, or those of `config.variants`, in turns on inputs (batch, d) with cold caches.

    Seconds are per block. `speedup` and `spread` are over dense fp32 torch; `bandwidth_share` is the bytes of weights
    read per second, in the best round, over the memory bandwidth. Raises BadInput for an unknown variant.
    """
    shape, rounds, target = block_shape(config), config.rounds, find_device(config.device)
    names = chosen(config.variants, VARIANTS, BASELINE)
    set_threads(config.threads)
    copies = max(2, min(12, PASS_BYTES // (4 * sum(d_in * d_out for d_in, d_out in shape.projections))))
    blocks: dict[str, list[Block]] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            blocks[name] = [VARIANTS[name](shape, target) for _ in range(copies)]
        except Unavailable as reason:
            skipped[name] = str(reason)
    runs = {name: _passes(members, shape, target) for name, members in blocks.items()}
    memory = bandwidth(target)
    times = interleaved(runs, rounds, target, cold=True)
    memory = max(memory, bandwidth(target))  # the larger of two, since other processes may use the machine
    variants = {name: _per_block(times.summary(name, BASELINE), blocks[name][0].bytes, copies, memory) for name in runs}
    others = {name: entry for name, entry in variants.items() if name != BASELINE}
    return Benchmark(
        ffn=BlockShape(**vars(shape), top_k=shape.active // shape.rank),
        **circumstances(target, rounds),
        kernels=_kernels(shape, target.type) if "pilon_ternary" in variants else None,
        memory_bytes_per_second=memory,
        speedup={name: entry.speedup for name, entry in others.items()},
        spread={name: entry.spread for name, entry in others.items()},
        variants=variants,
        skipped=skipped,
    )


def _kernels(shape: Shape, device: str) -> dict[str, str]:
    """Return the kernel of each projection of `pilon_ternary`, by its shape."""
    found, active = {}, dispatch.padded(shape.active)
    pads = "" if active == shape.active else f", k·r {shape.active} computed as {active}"
    for d_in, d_out in shape.projections:
        one = dispatch.kernel(device, d_in, GROUP if d_in > d_out else 0)
        found[f"{d_in}→{d_out}"] = f"ternary {one.name}{pads}"
    return found


def _per_block(whole: Timing, size: int, copies: int, memory: float) -> Timing:
    """Return the times of one block with `size` bytes of weights, from those of a pass through all copies."""
    seconds, least = whole.seconds / copies, whole.least_seconds / copies
    per_block = {"seconds": seconds, "least_seconds": least, "bytes": size, "bandwidth_share": size / least / memory}
    return whole.model_copy(update=per_block)


def _passes(blocks: Sequence[Block], shape: Shape, device: torch.device) -> Callable[[], None]:
    x = torch.randn(shape.batch, shape.d, device=device, dtype=blocks[0].dtype)

    def run() -> None:
        for block in blocks:
            block.run(x)

    return run


def chosen(only: Sequence[str], known: Sequence[str] | dict[str, Any], baseline: str) -> list[str]:
    """Return the names to time: all of `known`, or the baseline and `only`. Raises BadInput for an unknown name."""
    for name in only:
        if name not in known:
            raise BadInput(f"there is no variant {name!r}; there are {', '.join(known)}")
    return [name for name in known if not only or name == baseline or name in only]


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads of this process; None leaves it."""
    if threads is not None:
        torch.set_num_threads(threads)


def circumstances(device: torch.device, rounds: int) -> dict[str, Any]:
    """Return the device, hardware, kernel, threads, rounds and torch version of a benchmark."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    if device.type in dispatch.TRITON:
        kernel = "triton" if dispatch.available(device.type) else "torch"
    else:
        kernel = next(iter(cpu.isas()), "torch")
    return {
        "device": str(device),
        "hardware": hardware,
        "kernel": kernel,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "torch": torch.__version__,
    }
