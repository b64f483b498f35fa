"""Kernels equal the reference bit for bit: every instruction set, shape and batch."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pilon_compress.kernels import cpu, dispatch, reference
from pilon_compress.kernels.cpu import CpuProjection, MatrixTiles
from pilon_compress.kernels.cpu_layout import pack, unpack
from pilon_compress.nn.int8 import Int8Product

few = settings(max_examples=40, deadline=None, derandomize=True)
needs_kernel = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler here")


def trits(*shape: int) -> Tensor:
    return torch.randint(-1, 2, shape, dtype=torch.int8)


def bank(n, k, rank, d_in, d_out, group=0, shift=True, bias=True, norm=False) -> CpuProjection:
    return CpuProjection(
        cpu.tiles(trits(n, d_in, rank), trits(n, rank, d_out)),
        torch.randn(k * rank) * 0.01,
        torch.randperm(n)[:k],
        torch.randn(k * rank) * 0.1 if shift else None,
        torch.randn(d_out) if bias else None,
        group,
        torch.rand(d_in) + 0.5 if norm else None,
    )


def matrix(d_in, d_out, group=0) -> CpuProjection:
    return CpuProjection(cpu.matrix_tiles(trits(d_in, d_out)), torch.randn(d_out), bias=torch.randn(d_out), group=group)


def integers(codes: Tensor, digits: Tensor, scales: Tensor, group: int) -> Tensor:
    """Sums in whole numbers, scaled and added up in float32."""
    group = group or codes.shape[-1]
    total = None
    for g in range(scales.shape[-1]):
        part = slice(g * group, (g + 1) * group)
        term = (codes[..., part].long() @ digits[part].long()).float() * scales[..., g : g + 1]
        total = term if total is None else total + term
    return total


def expected(x: Tensor, p: CpuProjection) -> Tensor:
    """Compute a projection with integer sums and the quantiser of the models."""
    if p.norm is not None:
        x = torch.nn.functional.rms_norm(x, x.shape[-1:], p.norm, p.eps)
    codes, scales = reference.quantise(x, p.group)
    if isinstance(p.tiles, MatrixTiles):
        y = integers(codes, p.tiles.unpacked(), scales, p.group) * p.scale
    else:
        A, B = (one[p.selected] for one in p.tiles.unpacked())
        u = integers(codes, A.permute(1, 0, 2).flatten(1), scales, p.group) * p.scale
        codes, scales = reference.quantise(u if p.shift is None else u + p.shift)
        y = integers(codes, B.flatten(0, 1), scales, 0)
    return y if p.bias is None else y + p.bias


@few
@given(n=st.integers(1, 3), d=st.integers(1, 40), m=st.integers(1, 40))
def test_packing_is_undone_by_unpacking(n, d, m):
    digits = trits(n, d, m)
    assert torch.equal(unpack(pack(digits), d, m), digits)
    assert pack(digits).numel() == n * -(-m // 16) * -(-d // 8) * 32


@few
@given(
    tokens=st.integers(1, 9),
    n=st.integers(1, 5),
    rank=st.sampled_from([16, 32, 48]),
    d_in=st.integers(1, 300),
    d_out=st.integers(1, 80),
    group=st.sampled_from([0, 16, 128]),
    shift=st.booleans(),
    seed=st.integers(0, 99),
)
@example(tokens=40, n=5, rank=16, d_in=768, d_out=320, group=128, shift=True, seed=0)
@example(tokens=1, n=4, rank=48, d_in=3072, d_out=768, group=128, shift=False, seed=1)
def test_exact_projections(tokens, n, rank, d_in, d_out, group, shift, seed):
    torch.manual_seed(seed)
    k = int(torch.randint(1, n + 1, ()))
    x = torch.randn(tokens, d_in)
    for p in (bank(n, k, rank, d_in, d_out, group, shift), matrix(d_in, d_out, group)):
        assert torch.equal(cpu.project(x, p), expected(x, p))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("k", [8, 50])
def test_exact_with_many_primitives(tokens, k):
    p = bank(60, k, 16, 90, 40 * 16 + 5)
    x = torch.randn(tokens, 90)
    assert torch.equal(cpu.project(x, p), expected(x, p))


@few
@given(
    shape=st.sampled_from([(1,), (1, 1), (2, 3), (9,), (33,)]),
    gated=st.booleans(),
    group=st.sampled_from([0, 16, 32, 128]),
    activation=st.sampled_from(sorted(reference.ACTIVATIONS)),
    kinds=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    norm=st.booleans(),
    seed=st.integers(0, 99),
)
def test_exact_feed_forward(shape, gated, group, activation, kinds, norm, seed):
    torch.manual_seed(seed)
    d, hidden = 72, int(torch.randint(1, 400, ()))
    up, gate = (bank(4, 3, 16, d, hidden) if kind else matrix(d, hidden) for kind in kinds[:2])
    down = bank(5, 2, 32, hidden, d, group, norm=norm) if kinds[2] else matrix(hidden, d, group)
    x = torch.randn(*shape, d)
    act = reference.ACTIVATIONS[activation]
    h = act(expected(x, gate)) * expected(x, up) if gated else act(expected(x, up))
    assert torch.equal(cpu.ffn(x, up, down, gate if gated else None, activation), expected(h, down))


@pytest.mark.parametrize("digit", [-1, 1])
@pytest.mark.parametrize("tokens", [1, 8])
def test_exact_at_the_largest_sums(digit, tokens):
    """Check codes at ±127 with equal weights, where sums of int16 would overflow many times over."""
    x = torch.full((tokens, 20_000), 3.0)
    x[1::2] = -3.0
    p = bank(2, 2, 16, 20_000, 24)
    p.tiles = cpu.tiles(torch.full((2, 20_000, 16), digit), torch.full((2, 16, 24), digit))
    for group in (0, 4096):
        p.group = group
        assert torch.equal(cpu.project(x, p), expected(x, p))
    whole = CpuProjection(cpu.matrix_tiles(torch.full((20_000, 16), digit)), torch.ones(16))
    assert torch.equal(cpu.project(x, whole), expected(x, whole))
    assert float(cpu.project(x, whole)[0, 0]) == pytest.approx(60_000 * digit, rel=1e-6)


def test_exact_for_odd_numbers():
    """Zeros, denormals and huge values; NaN and infinity stay in their token."""
    x = torch.randn(6, 64)
    x[0], x[1], x[2], x[3, 7], x[4, 9] = 0.0, 1e-42, 3e38, torch.nan, torch.inf
    up, down = bank(2, 1, 16, 64, 64, shift=False), bank(2, 1, 16, 64, 64, group=32, shift=False)
    y = cpu.ffn(x, up, down)
    alone = expected(torch.relu(expected(x, up)).square(), down)
    assert torch.equal(y.isnan(), alone.isnan()) and y[3:5].isnan().all() and not y[[0, 1, 5]].isnan().any()
    assert torch.equal(y.nan_to_num(), alone.nan_to_num())


@few
@given(tokens=st.integers(1, 4), d_in=st.integers(1, 200), d_out=st.integers(1, 70), bias=st.booleans())
def test_exact_int8_linear(tokens, d_in, d_out, bias):
    weight = torch.randint(-128, 128, (d_out, d_in), dtype=torch.int8)
    scale, offset, x = torch.rand(d_out), torch.randn(d_out) if bias else None, torch.randn(tokens, d_in)
    codes, scales = reference.quantise(x)
    y = (codes.long() @ weight.long().T).float() * scales * scale
    y = y if offset is None else y + offset
    assert torch.equal(Int8Product()(x, weight, scale, offset), y)
    assert torch.equal(reference.int8_linear(x, weight, scale, offset), y)
    filled = reference.integer_product(codes.to(torch.int8), weight, padded=True)  # as on a GPU
    assert torch.equal(filled.long(), codes.long() @ weight.long().T)


def test_what_is_multiplied_on_a_gpu_has_the_shapes_that_it_takes(monkeypatch):
    asked, real = [], torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: asked.append((*a.shape, b.shape[1])) or real(a, b))
    for tokens, d_in, d_out in ((1, 48, 57), (17, 50, 16), (40, 64, 24)):
        whole = torch.ones(tokens + d_out, d_in, dtype=torch.int8)
        assert reference.integer_product(whole[:tokens], whole[tokens:], padded=True).eq(d_in).all()
    assert asked == [(32, 48, 64), (32, 64, 16), (40, 64, 24)]


def test_int8_rows_restore_a_weight_to_half_a_step():
    weight = torch.randn(30, 50)
    whole, scale = reference.int8_rows(weight)
    assert ((whole.float() * scale[:, None] - weight).abs() <= 0.501 * scale[:, None]).all()


@needs_kernel
def test_exact_with_more_threads():
    p, wide = bank(3, 2, 32, 200, 300), bank(3, 3, 16, 300, 200, group=128)
    before = torch.get_num_threads()
    try:
        for tokens in (1, 5, 50):
            x = torch.randn(tokens, 200)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(cpu.ffn(x, p, wide))
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


@needs_kernel
@pytest.mark.parametrize("isa", cpu.isas()[2:])
def test_every_instruction_set_is_exact(bare, isa):
    """The tests above, once more for each set that is not the one in use."""
    words = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "exact and not every", __file__]
    done = bare.python("import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))", *words, PILON_ISA=isa, code=None)
    assert done.returncode == 0 and "passed" in done.stdout and "skipped" not in done.stdout, done.stdout


def test_narrower_types_round_between_layers_as_layers_do():
    up, down = bank(3, 2, 16, 64, 96), bank(3, 2, 16, 96, 64, group=32)
    x = torch.randn(4, 64, dtype=torch.bfloat16)

    def layer(x: Tensor, p: CpuProjection) -> Tensor:
        plain = CpuProjection(p.tiles, p.scale, p.selected, p.shift, None, p.group)
        return expected(x, plain).to(x.dtype) + p.bias.to(x.dtype)

    y = cpu.ffn(x, up, down)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(torch.relu(layer(x, up)).square(), down))


@needs_kernel
@pytest.mark.parametrize("activation", ["relu2", "silu"])
def test_exact_when_prepared_and_what_nobody_holds_is_forgotten(activation):
    up, gate, down = bank(3, 2, 16, 64, 96), matrix(64, 96), bank(3, 2, 16, 96, 64, group=32)
    for second in (None, gate):
        run = cpu.prepared_ffn(up, down, second, activation)
        for x in (torch.randn(64), torch.randn(40, 2, 64), torch.randn(64, 3).T, torch.randn(2, 64).bfloat16()):
            assert torch.equal(run(x), cpu.ffn(x, up, down, second, activation))
    one = cpu.prepared(up)
    x = torch.randn(3, 64)
    assert torch.equal(one(x), cpu.project(x, up))
    up.scale.mul_(2)
    assert torch.equal(one(x), cpu.project(x, up)), "it computes with what its tensors hold"
    with pytest.raises(RuntimeError, match="x has 63 columns instead of 64"):
        one(x[:, 1:])
    number = one._number
    del one
    with pytest.raises(RuntimeError, match="nothing is prepared"):
        torch.ops.pilon.run(x, number)


@needs_kernel
def test_export_sees_one_operator_and_its_shape():
    up, down = bank(3, 2, 16, 64, 96), bank(3, 2, 16, 96, 64, group=32)

    class Block(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return cpu.ffn(x, up, down)

    x = torch.randn(2, 5, 64)
    program = torch.export.export(Block(), (x,), dynamic_shapes=({1: torch.export.Dim("tokens")},))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.pilon.ffn.default]
    longer = torch.randn(2, 9, 64)
    assert torch.equal(program.module()(longer), cpu.ffn(longer, up, down))


@needs_kernel
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"selected": torch.tensor([0, 7])}, "primitive 7 of 3"),
        ({"scale": torch.ones(8)}, "scale has 8 numbers instead of 32"),
        ({"bias": torch.ones(5)}, "bias has 5"),
        ({"shift": torch.ones(32, dtype=torch.float64)}, "shift must be"),
    ],
)
def test_wrong_tensors_are_refused_before_memory_is_read(change, says):
    p = bank(3, 2, 16, 64, 96)
    for name, value in change.items():
        setattr(p, name, value)
    with pytest.raises(RuntimeError, match=says):
        cpu.project(torch.randn(1, 64), p)


@needs_kernel
@few
@given(
    rank=st.integers(1, 40),
    n=st.integers(1, 4),
    d_in=st.integers(1, 70),
    d_out=st.integers(1, 40),
    group=st.sampled_from([0, 16, 32]),
    shift=st.booleans(),
    seed=st.integers(0, 99),
)
def test_exact_with_any_rank_and_width_on_the_kernel(rank, n, d_in, d_out, group, shift, seed):
    torch.manual_seed(seed)
    k = int(torch.randint(1, n + 1, ()))
    A, B, selected, x = trits(n, d_in, rank), trits(n, rank, d_out), torch.randperm(n)[:k], torch.randn(3, d_in)
    vectors = [torch.randn(k * rank) * 0.01, torch.randn(k * rank) if shift else None]
    run = dispatch.composed(dispatch.bank(A, B, group), selected, *vectors, group)
    assert isinstance(run, cpu.Prepared), "it is not on the kernel"
    expected = reference.compose(x, A, B, selected, *vectors, group=group)
    assert torch.equal(run(x), expected)
    packed = dispatch.bank(*dispatch.side_by_side(A, B, selected), group)
    run = dispatch.composed(packed, torch.zeros(1, dtype=torch.int64), *vectors, group)
    assert isinstance(run, cpu.Prepared) and torch.equal(run(x), expected)
    scale = torch.randn(d_out)
    run = dispatch.multiplied(dispatch.matrix(A[0] @ B[0] % 2, group), scale, group)
    assert isinstance(run, cpu.Prepared)
    assert torch.equal(run(x), reference.ternary_linear(x, A[0] @ B[0] % 2, scale, None, group))


def test_ranks_that_are_no_whole_tiles_are_refused():
    with pytest.raises(ValueError, match="rank 24 is not a multiple of 16"):
        cpu.tiles(trits(2, 8, 24), trits(2, 24, 8))
