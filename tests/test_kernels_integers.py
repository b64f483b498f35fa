"""Products with integers of 8, 4, 3 and 2 bits by the CPU kernel, against float64."""

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pilon_compress.kernels import cpu, integers
from pilon_compress.kernels.integer_layout import BITS, tiles, unpack
from pilon_compress.nn.formats.registry import FORMATS

few = settings(max_examples=25, deadline=None)
needs_kernel = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler here")
bits = st.sampled_from(BITS)


def codes(*shape: int, of: int) -> Tensor:
    return torch.randint(-(1 << of - 1), 1 << of - 1, shape, dtype=torch.int8)


def close(y: Tensor, exact: Tensor, size: Tensor) -> bool:
    """Compare with a float64 product, relative to `size`, the sum of the magnitudes of its terms."""
    return bool(((y.double() - exact).abs() <= 1e-6 * size + 1e-30).all())


@few
@given(bits=bits, n=st.integers(1, 3), d=st.integers(1, 150), m=st.integers(1, 40), group=st.sampled_from((0, 16, 64)))
def test_words_hold_every_code(bits, n, d, m, group):
    stored = codes(n, d, m, of=bits)
    groups = -(-d // group) if group else 1
    assert torch.equal(unpack(tiles(stored, torch.ones(n, groups, m), bits, group)), stored)


@needs_kernel
@few
@given(
    bits=bits,
    tokens=st.integers(1, 40),
    d=st.integers(1, 200),
    m=st.integers(1, 70),
    group=st.sampled_from((0, 16, 64)),
    bias=st.booleans(),
)
@example(bits=3, tokens=5, d=130, m=17, group=64, bias=True)
def test_a_matrix_multiplies_as_the_numbers_that_it_stands_for(bits, tokens, d, m, group, bias):
    stored, groups = codes(1, d, m, of=bits), -(-d // group) if group else 1
    scale = torch.randn(1, groups, m).bfloat16()
    whole = (stored * scale.double().repeat_interleave(group or d, 1)[:, :d])[0]
    x, offset = torch.randn(tokens, d), torch.randn(m) if bias else None
    y = integers.linear(tiles(stored, scale, bits, group), offset)(x)
    exact = x.double() @ whole + (0 if offset is None else offset.double())
    assert close(y, exact, x.double().abs() @ whole.abs() + 1)


@needs_kernel
@pytest.mark.parametrize("name", ["int8", "int4", "int3", "int2"])
@pytest.mark.parametrize("rank", [5, 16, 40])
def test_a_bank_composes_as_the_numbers_that_it_stands_for(name, rank):
    grid = FORMATS[name].grid
    bank = FORMATS[name].bank(100, 150, 4, rank)
    A, B = torch.randn(4, 100, rank), torch.randn(4, rank, 150)
    for side, values in (("A", A), ("B", B.transpose(1, 2).contiguous())):
        scale = grid.scales(values)
        found = grid.nearest(values / grid.spread(scale.float(), values.shape[1])).to(torch.int8)
        getattr(bank, side).put(found, scale)
    selected, weight, x = torch.tensor([3, 0, 2]), torch.randn(3, rank), torch.randn(2, 7, 100)
    with torch.no_grad():
        y = bank(x, selected, weight)
        again = copy.deepcopy(bank)(x[:, :1], selected, weight)
    A, B = (part.double() for part in bank.primitives(selected))
    u = torch.einsum("btd,kdr->btkr", x.double(), A) * weight.double()
    exact = torch.einsum("btkr,kro->bto", u, B)
    assert close(y, exact, torch.einsum("btkr,kro->bto", u.abs(), B.abs()) * 4)
    assert torch.equal(again, y[:, :1]), "a token's numbers depend on the tokens beside it"
    learning = x.clone().requires_grad_()
    bank(learning, selected, weight).sum().backward()
    assert close(
        learning.grad[0, 0],
        torch.einsum("dkr,kr,kr->d", A.permute(1, 0, 2), weight.double(), B.sum(2)),
        torch.einsum("dkr,kr,kr->d", A.abs().permute(1, 0, 2), weight.double().abs(), B.abs().sum(2)),
    )


@needs_kernel
@pytest.mark.parametrize("bias", [False, True])
def test_a_written_matrix_is_packed_again(bias):
    matrix = FORMATS["int4"].matrix(70, 20, bias, (70, 20), 0)
    matrix.put(codes(1, 70, 20, of=4), torch.ones(1, 2, 20))
    x = torch.eye(70)
    with torch.no_grad():
        assert torch.equal(matrix(x), matrix.matrix())
        matrix.put(codes(1, 70, 20, of=4), torch.full((1, 2, 20), 0.5))
        assert torch.equal(matrix(x), matrix.matrix()), "the product is that of the codes before"
        if bias:
            matrix.bias.fill_(1.0)
            assert torch.equal(matrix(x), matrix.matrix() + 1)
    halves = matrix(x.bfloat16()).detach()
    assert halves.dtype == torch.bfloat16 and torch.equal(halves.float(), matrix.matrix() + (1 if bias else 0))


@needs_kernel
def test_exact_with_more_threads():
    stored, scale = codes(1, 300, 200, of=4), torch.rand(1, 5, 200)
    product = integers.linear(tiles(stored, scale, 4, 64))
    before = torch.get_num_threads()
    try:
        for tokens in (1, 3, 40):
            x, ys = torch.randn(tokens, 300), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                ys.append(product(x))
            assert all(torch.equal(y, ys[0]) for y in ys)
    finally:
        torch.set_num_threads(before)


@needs_kernel
@pytest.mark.parametrize("isa", cpu.isas()[2:])
def test_every_instruction_set_computes_the_same_products(bare, isa):
    words = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "stands_for or threads", __file__]
    done = bare.python("import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))", *words, PILON_ISA=isa, code=None)
    assert done.returncode == 0 and "passed" in done.stdout and "skipped" not in done.stdout, done.stdout
