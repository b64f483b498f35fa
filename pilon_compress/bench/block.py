"""The benchmark of one feed-forward block: dense and PILON in every number format, side by side, no model needed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pilon_compress.bench.block_variants import BASELINE, CONTENDERS, Block, NotHere, Shape
from pilon_compress.bench.timing import bandwidth, interleaved
from pilon_compress.config.benchmark import BenchConfig
from pilon_compress.errors import BadInput
from pilon_compress.kernels import cpu, dispatch
from pilon_compress.models.checkpoint import find_device

COPIES = 256 * 2**20  # bytes of dense weights that a pass goes through: more than caches hold


def block_shape(asked: BenchConfig) -> Shape:
    """Return the shape of the block that is asked for. `asked.ffn` is 768x3072 or the like."""
    d, hidden = map(int, str(asked.ffn).split("x"))
    rank = asked.rank
    active = asked.top_k * rank if asked.top_k is not None else asked.active_rank or max(rank, d // 4 // rank * rank)
    return Shape(
        d, hidden, active, rank, asked.gated, asked.activation or ("silu" if asked.gated else "relu2"), asked.batch
    )


@torch.inference_mode()
def bench_block(asked: BenchConfig) -> dict[str, Any]:
    """Time all contenders on inputs (batch, d), caches cold, in turns: those of `asked.variants` if there are some.

    Seconds are per block. `speedup` and `spread` are over dense fp32 torch; `bandwidth_share` is the weights read per
    second, at best, over what the memory gives. Raises BadInput for a name that is no contender.
    """
    shape, rounds, target = block_shape(asked), asked.rounds, find_device(asked.device)
    names = chosen(asked.variants, CONTENDERS, BASELINE)
    set_threads(asked.threads)
    copies = max(2, min(12, COPIES // (4 * sum(d_in * d_out for d_in, d_out in shape.projections))))
    blocks: dict[str, list[Block]] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            blocks[name] = [CONTENDERS[name](shape, target) for _ in range(copies)]
        except NotHere as reason:
            skipped[name] = str(reason)
    runs = {name: _passes(members, shape, target) for name, members in blocks.items()}
    memory = bandwidth(target)
    times = interleaved(runs, rounds, target, cold=True)
    memory = max(memory, bandwidth(target))  # of before and after: others may use the machine, too
    variants = {name: times.summary(name, BASELINE) for name in runs}
    for name, entry in variants.items():
        size = blocks[name][0].bytes
        seconds, least = entry["seconds"] / copies, entry["least_seconds"] / copies
        entry |= {"seconds": seconds, "least_seconds": least, "bytes": size}
        entry["bandwidth_share"] = size / least / memory
    return {
        "ffn": {**vars(shape), "top_k": shape.active // shape.rank},
        **circumstances(target, rounds),
        "memory_bytes_per_second": memory,
        "speedup": {name: entry["speedup"] for name, entry in variants.items() if name != BASELINE},
        "spread": {name: entry["spread"] for name, entry in variants.items() if name != BASELINE},
        "variants": variants,
        "skipped": skipped,
    }


def _passes(blocks: Sequence[Block], shape: Shape, device: torch.device) -> Callable[[], None]:
    x = torch.randn(shape.batch, shape.d, device=device, dtype=blocks[0].dtype)

    def run() -> None:
        for block in blocks:
            block.run(x)

    return run


def chosen(only: Sequence[str], known: Sequence[str] | dict[str, Any], baseline: str) -> list[str]:
    """The names to time: all of `known`, or the baseline and those of `only`. Raises BadInput for an unknown one."""
    for name in only:
        if name not in known:
            raise BadInput(f"{name!r} is no variant; there are {', '.join(known)}")
    return [name for name in known if not only or name == baseline or name in only]


def set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def circumstances(device: torch.device, rounds: int) -> dict[str, Any]:
    """What the figures depend on besides the model."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    if device.type in dispatch.TRITON:
        kernel = "triton" if dispatch.available(device.type) else "torch"
    else:
        kernel = next(iter(cpu.isas()), "torch")
    return {
        "device": str(device),
        "hardware": where,
        "kernel": kernel,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "torch": torch.__version__,
    }
