"""Compile for sm_90, without a GPU, every kernel that some blocks would launch; prints a JSON line per kernel, then one
per kernel that torch finds when it traces the operators. With `all`, every shape instead of one per kernel.

Run as a script: the interpreter must be off, which tests of the kernels' results have on.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pilon_compress.kernels import gpu, triton_launch

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64"}
SEEN: dict[str, tuple[Any, ...]] = {}
EVERY = sys.argv[1:] == ["all"]
TARGET = GPUTarget("cuda", 90, 32)


class Recorder:
    """Stands where `wrap_triton` is: notes what would be launched, as triton's own launcher would specialise it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *arguments: Any, **named: Any) -> None:
        options = {"num_warps": named.pop("num_warps", 4)}
        given = {**dict(zip(self.kernel.arg_names, arguments, strict=False)), **named}
        signature, constants, attributes = {}, {}, {}
        for index, name in enumerate(self.kernel.arg_names):
            value = given[name]
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif name in named or value is None or (type(value) is int and value == 1):
                signature[name], constants[(index,)] = "constexpr", value
            else:
                signature[name] = "i32"
                if value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        worth = {name: given.get(name) for name in ("GROUP", "CODED", "GROUPED", "BM")}
        key = (self.kernel.fn.__name__, *((signature, constants, attributes) if EVERY else worth.items()))
        SEEN.setdefault(repr(key), (self.kernel, signature, constants, attributes, options))


def bank(n: int, d_in: int, r: int, d_out: int) -> gpu.BankWords:
    A = torch.zeros(n, d_in // 16, r, dtype=torch.int32)
    return gpu.BankWords(A, torch.zeros(n, r // 16, d_out, dtype=torch.int32), d_in)


def projection(d_in: int, d_out: int, r: int, k: int, full: bool) -> gpu.GpuProjection:
    scale = torch.ones(k * r)
    shift, bias = (scale, torch.ones(d_out)) if full else (None, None)
    return gpu.GpuProjection(bank(k, d_in, r, d_out), torch.arange(k), scale, shift, bias)


def block(tokens: int, d: int, ff: int, r: int, k: int, gated: bool, act: str) -> None:
    up, down = projection(d, ff, r, k, not gated), projection(ff, d, r, k, not gated)
    gpu.ffn(torch.zeros(tokens, d, dtype=torch.bfloat16), up, down, up if gated else None, act)


def compiled(kernel: Any, signature: Any, constants: Any, attributes: Any, options: Any) -> dict[str, Any]:
    started = time.time()
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=TARGET, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
        use = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", use)}
    return {
        "kernel": kernel.fn.__name__,
        "given": {name: constants[(at,)] for at, name in enumerate(kernel.arg_names) if (at,) in constants},
        "shared": built.metadata.shared,
        "fused": len(re.findall(r"\bfma\.", built.asm["ptx"])),
        **usage,
        **{word: len(re.findall(rf"\b{word}\b", sass)) for word in ("IDP", "IMMA", "IGMMA", "STL", "LDL")},
        "seconds": round(time.time() - started, 2),
    }


class Driver:
    """Stand-in for triton's driver that names the target GPU on a machine without one."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0


def traced() -> list[dict[str, Any]]:
    """The kernels in what torch makes of the operators for its compilers, with the arguments that they write to."""
    triton.runtime.driver.set_active(Driver())
    from torch._functorch.aot_autograd import aot_export_module
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device("cuda"):
        up, down = projection(64, 256, 16, 2, True), projection(256, 64, 16, 2, True)

        class Blocks(torch.nn.Module):
            def forward(self, x: torch.Tensor, *flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
                first, second = (
                    gpu.GpuProjection(gpu.BankWords(*p[:2], d), *p[2:]) for p, d in ((flat[:6], 64), (flat[6:], 256))
                )
                matrix = gpu.MatrixWords(first.words.A, first.selected, 64)
                return gpu.ffn(x, first, second), gpu.compose(x, *first), gpu.ternary_linear(x, matrix, first.scale)

        flat = [*gpu._tensors(up), *gpu._tensors(down)]
        graph, _ = aot_export_module(Blocks(), [torch.randn(3, 64), *flat], trace_joint=False)
    nodes = [node.kwargs for node in graph.graph.nodes if "kernel_idx" in node.kwargs]
    return [
        {"traced": kernel_side_table.get_kernel(node["kernel_idx"]).fn.__name__, "writes": node["tensors_to_clone"]}
        for node in nodes
    ]


BLOCKS = [
    (1, 512, 2048, 32, 8, False, "relu2"),
    (1, 1024, 4096, 64, 8, True, "silu"),
    (32, 1024, 4096, 64, 8, False, "gelu_tanh"),
    (512, 1024, 4096, 64, 8, True, "silu"),
]
MORE = [
    (1, 512, 2048, 16, 8, True, "silu"),
    (1, 512, 2048, 16, 8, False, "gelu"),
    (1, 4096, 11008, 64, 16, True, "silu"),
    (1, 4096, 11008, 64, 32, True, "silu"),
    (32, 4096, 11008, 64, 32, True, "silu"),
]

if __name__ == "__main__":
    wrap, triton_launch.wrap_triton = triton_launch.wrap_triton, Recorder
    for shape in [*BLOCKS, *(MORE if EVERY else ())]:
        block(*shape)
    if EVERY:
        gpu.compose(torch.zeros(1, 4096), *projection(4096, 1024, 32, 16, True), 128)
    triton_launch.wrap_triton = wrap
    for found in [*(compiled(*kernel) for kernel in SEEN.values()), *traced()]:
        print(json.dumps(found), flush=True)
