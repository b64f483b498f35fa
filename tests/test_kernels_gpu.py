"""The Triton kernels: exact in the interpreter, and refused where they do not suit."""

import sys

import pytest
import torch

from pilon_compress.errors import BadInput
from pilon_compress.kernels import dispatch, reference

pytestmark = pytest.mark.usefixtures("triton")

ACTS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x) ** 2,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


@pytest.fixture
def gpu():
    """The kernels, in the interpreter (conftest.py)."""
    from pilon_compress.kernels import gpu
    from pilon_compress.kernels.triton_arithmetic import EMULATED

    assert EMULATED, "run the tests without TRITON_INTERPRET=0: these compare on the CPU"
    return gpu


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


def codes_of(x, group=0):
    """[(codes int64, scale)] of each group of x, by the definition."""
    coded = []
    for part in x.float().split(group or x.shape[-1], -1):
        largest = part.abs().amax(-1, keepdim=True).clamp_min(1e-20)
        coded.append(((part * (127 / largest)).round().long(), largest / 127))
    return coded


def by_hand(x, digits, selected, scale, shift=None, bias=None, group=0):
    """The projection in int64 and float32, group by group."""
    A, B = (part[selected].long() for part in digits)
    A, B = A.permute(1, 0, 2).flatten(1), B.flatten(0, 1)
    u, start = None, 0
    for codes, s in codes_of(x, group):
        part = (codes @ A[start : start + codes.shape[-1]]).float() * s
        u, start = part if u is None else u + part, start + codes.shape[-1]
    u = u * scale if shift is None else u * scale + shift
    ((codes, s),) = codes_of(u)
    y = (codes @ B).float() * s
    return y if bias is None else y + bias


def some_digits(draw, n, d_in, r, d_out):
    return tuple(
        torch.randint(-1, 2, shape, generator=draw, dtype=torch.int8) for shape in ((n, d_in, r), (n, r, d_out))
    )


def some_projection(gpu, draw, n, d_in, r, d_out, k, full=True):
    """A projection and what computes it by hand."""
    digits = some_digits(draw, n, d_in, r, d_out)
    selected = torch.randperm(n, generator=draw)[:k]
    scale = torch.randn(k * r, generator=draw)
    shift, bias = (torch.randn(size, generator=draw) if full else None for size in (k * r, d_out))
    rest = (selected, scale, shift, bias)
    return gpu.GpuProjection(gpu.words(*digits), *rest), lambda x, group=0: by_hand(x, digits, *rest, group)


@pytest.mark.parametrize(
    ("tokens", "d_in", "r", "d_out", "group"),
    [
        (3, 100, 16, 72, 0),
        (2, 300, 48, 40, 128),
        (1, 160, 32, 33, 32),
        (20, 100, 16, 72, 0),
        (70, 300, 48, 40, 128),
    ],
)
@pytest.mark.parametrize("full", [True, False])
def test_projection_is_exact(gpu, draw, tokens, d_in, r, d_out, group, full):
    projection, reference = some_projection(gpu, draw, 5, d_in, r, d_out, 3, full)
    x = torch.randn(tokens, d_in, generator=draw) * torch.logspace(-9, 9, tokens)[:, None]
    assert torch.equal(gpu.compose(x, *projection, group), reference(x, group))


@pytest.mark.parametrize("tokens", [16, 40])
def test_values_between_two_codes_go_where_torch_sends_them(gpu, draw, tokens):
    """Check values half a step from two codes, where the last place of the step decides."""
    projection, reference = some_projection(gpu, draw, 2, 64, 16, 32, 2)
    x = (torch.arange(64) + 0.5) / 127 * (1 + torch.rand(tokens, 1, generator=draw))
    x[:, 0] = x[:, 63] / 63.5 * 127
    division = (x * torch.tensor(127.0).div(x[:, :1])).round()
    assert not torch.equal(division, codes_of(x)[0][0].float())  # a division would go elsewhere
    assert torch.equal(gpu.compose(x, *projection), reference(x))


def test_many_tokens_by_int_mm_are_exact(gpu, draw, monkeypatch):
    monkeypatch.setattr(gpu.triton_launch, "PREFILL", 24)
    projection, reference = some_projection(gpu, draw, 4, 72, 16, 40, 3)
    x = torch.randn(2, 13, 72, generator=draw)
    asked = []
    real = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: asked.append(a.shape) or real(a, b))
    assert torch.equal(gpu.compose(x, *projection), reference(x))
    assert asked == [(26, 80), (26, 48)]


def test_a_token_does_not_depend_on_its_batch(gpu, draw):
    projection, _ = some_projection(gpu, draw, 4, 200, 32, 48, 2)
    x = torch.randn(17, 200, generator=draw)
    x[3] = 0
    x[4, 7] = 3e4
    x[5] = 1e-30
    together = gpu.compose(x, *projection, 128)  # 17 tokens are tiles, 9 and 8 are not
    assert torch.equal(together, torch.cat([gpu.compose(part, *projection, 128) for part in x.split(9)]))
    assert together.isfinite().all()


def test_bfloat16_goes_in_and_comes_out(gpu, draw):
    projection, reference = some_projection(gpu, draw, 3, 64, 16, 32, 2)
    for tokens in (2, 17):
        x = torch.randn(tokens, 64, generator=draw).bfloat16()
        y = gpu.compose(x, *projection)
        assert y.dtype == torch.bfloat16 and torch.equal(y, reference(x).bfloat16())


@pytest.mark.parametrize(
    ("tokens", "d_in", "d_out", "group"),
    [(3, 100, 48, 0), (2, 300, 64, 128), (0, 64, 16, 0), (20, 100, 48, 0), (70, 300, 80, 32)],
)
def test_matrix_is_exact(gpu, draw, tokens, d_in, d_out, group):
    digits = torch.randint(-1, 2, (d_in, d_out), generator=draw, dtype=torch.int8)
    x, scale, bias = (torch.randn(*shape, generator=draw) for shape in ((tokens, d_in), (d_out,), (d_out,)))
    words = gpu.matrix_words(digits)
    for given in (bias, None):
        y = gpu.ternary_linear(x, words, scale, given, group)
        assert torch.equal(y, reference.ternary_linear(x, digits, scale, given, group))
    half = gpu.ternary_linear(x.bfloat16(), words, scale, None, group)
    assert torch.equal(half, reference.ternary_linear(x.bfloat16(), digits, scale, None, group).bfloat16())
    ((codes, s),) = codes_of(x)  # and the definition, in int64
    assert torch.equal(gpu.ternary_linear(x, words, scale), (codes @ digits.long()).float() * s * scale)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("way", ["two", "four", "five", "tiles"])
def test_block_is_exact_whichever_kernels_run(gpu, draw, monkeypatch, gated, way):
    """200 hidden units: the last group of 128 is short, and the last word of 16 too."""
    monkeypatch.setattr(gpu.triton_launch, "SMALL", 1 << 16 if way == "two" else 0)
    gate_k = 3 if way == "five" else 2
    gate, gate_reference = some_projection(gpu, draw, 4, 100, 16, 200, gate_k, full=False)
    up, up_reference = some_projection(gpu, draw, 4, 100, 16, 200, 2)
    down, down_reference = some_projection(gpu, draw, 4, 200, 32, 60, 2)
    x = torch.randn(17 if way == "tiles" else 2, 100, generator=draw)
    given = gate if gated else None
    expected_launches = {"two": 2, "four": 4, "five": 5 if gated else 4, "tiles": 0}[way]
    assert gpu.launches(x.shape[0], given, up) == expected_launches
    y = gpu.ffn(x, up, down, given, "relu2")
    h = ACTS["relu2"](gate_reference(x)) * up_reference(x) if gated else ACTS["relu2"](up_reference(x))
    assert torch.equal(y, down_reference(h, 128))


@pytest.mark.parametrize("act", ACTS)
def test_every_activation_is_the_same_in_every_kernel_and_close_to_torch(gpu, draw, monkeypatch, act):
    up, up_reference = some_projection(gpu, draw, 2, 32, 16, 128, 1)
    down, down_reference = some_projection(gpu, draw, 2, 128, 16, 32, 1)
    x = torch.randn(17, 32, generator=draw)
    y = gpu.ffn(x, up, down, None, act)
    for small in (0, 1 << 16):
        monkeypatch.setattr(gpu.triton_launch, "SMALL", small)
        assert torch.equal(gpu.ffn(x[:2], up, down, None, act), y[:2])
    expected = down_reference(ACTS[act](up_reference(x)), 128)
    assert (y - expected).norm() <= 0.01 * expected.norm()  # a code that falls on the other side is a step of 1 / 127


def test_words_hold_the_digits(gpu, draw):
    A, B = some_digits(draw, 3, 70, 32, 50)
    packed = gpu.words(A, B)
    assert packed.A.shape == (3, 5, 32) and packed.B.shape == (3, 2, 50) and packed.d_in == 70
    for words, digits in ((packed.A, A), (packed.B, B)):
        for number in (0, 1, 5, 15, 17, digits.shape[1] - 1):
            g, j = divmod(number % 16, 4)
            code = (words[:, number // 16].long() >> (8 * j + 2 * g)) & 3
            assert torch.equal(code - 1, digits[:, number].long())


def test_the_operators_keep_to_what_torch_asks_of_operators(gpu, draw):
    up, _ = some_projection(gpu, draw, 3, 64, 16, 128, 2)
    down, _ = some_projection(gpu, draw, 3, 128, 16, 64, 2)
    x = torch.randn(2, 3, 64, generator=draw)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(gpu.triton_ops.project, (x, gpu._tensors(up), 0), test_utils=checks)
    matrix = gpu.matrix_words(torch.ones(64, 32, dtype=torch.int8))
    given = (x, matrix.A, matrix.selected, torch.ones(32), None, 32)
    torch.library.opcheck(gpu.triton_ops.linear, given, test_utils=checks)
    torch.library.opcheck(gpu.triton_ops.ffn, (x, [], gpu._tensors(up), gpu._tensors(down), 2), test_utils=checks)

    class Block(torch.nn.Module):
        def forward(self, x):
            return gpu.ffn(x, up, down)

    exported = torch.export.export(Block(), (x,), dynamic_shapes=({1: torch.export.Dim("length", max=64)},))
    longer = torch.randn(2, 12, 64, generator=draw)
    assert torch.equal(exported.module()(longer), Block()(longer))
    assert "pilon_gpu.ffn" in str(exported.graph)


def test_what_the_kernels_cannot_do_is_refused(gpu, draw):
    with pytest.raises(BadInput, match="rank 24 is not a multiple of 16"):
        gpu.words(*some_digits(draw, 2, 32, 24, 32))
    up, _ = some_projection(gpu, draw, 2, 32, 16, 32, 1)
    with pytest.raises(BadInput, match="24 outputs are not a multiple of 16"):
        gpu.matrix_words(torch.zeros(32, 24, dtype=torch.int8))
    with pytest.raises(BadInput, match="not 96"):
        gpu.compose(torch.zeros(1, 32), *up, 96)
    with pytest.raises(BadInput, match="x has 31 values"):
        gpu.compose(torch.zeros(1, 31), *up)
    with pytest.raises(BadInput, match="'swish'"):
        gpu.ffn(torch.zeros(1, 32), up, up, activation="swish")


@pytest.fixture
def untried(monkeypatch):
    """Make the CPU count as a GPU, as in a new process that has not tried Triton."""
    monkeypatch.setattr(dispatch, "TRITON", {"cpu"})
    dispatch._works.cache_clear()
    yield
    dispatch._works.cache_clear()


def zeros_like_a_broken_card(x, *rest):
    return x.new_zeros(len(x), 16)


@pytest.mark.parametrize("reason", ["PILON_KERNELS=0", "pip install 'pilon-compress[gpu]'", "wrong numbers"])
def test_without_triton_the_same_numbers_come_and_one_warning_says_why(gpu, draw, untried, monkeypatch, caplog, reason):
    A, B = some_digits(draw, 3, 64, 16, 32)
    x, selected, scale = torch.randn(2, 64, generator=draw), torch.tensor([2, 0]), torch.randn(32, generator=draw)
    by_triton = dispatch.bank(A, B, 32)
    assert isinstance(by_triton, gpu.BankWords) and isinstance(dispatch.matrix(A[0], 32), gpu.MatrixWords)
    assert not caplog.records
    dispatch._works.cache_clear()
    if reason == "PILON_KERNELS=0":
        monkeypatch.setenv("PILON_KERNELS", "0")
    elif reason == "wrong numbers":
        monkeypatch.setattr(gpu, "ternary_linear", zeros_like_a_broken_card)
    else:
        monkeypatch.delitem(sys.modules, "pilon_compress.kernels.gpu")
        monkeypatch.delattr("pilon_compress.kernels.gpu")
        monkeypatch.setitem(sys.modules, "triton", None)
    for _ in range(2):
        plain = dispatch.bank(A, B, 32)
        assert not isinstance(plain, gpu.BankWords) and not isinstance(dispatch.matrix(A[0], 32), gpu.MatrixWords)
    (said,) = (record.getMessage() for record in caplog.records if record.name == dispatch.__name__)
    assert "plain torch" in said and reason in said
    monkeypatch.undo()
    a, b = (dispatch.composed(packed, selected, scale, None, 32)(x) for packed in (plain, by_triton))
    assert torch.equal(a, b)


def test_what_does_not_suit_the_kernels_goes_elsewhere_and_says_so_once(gpu, draw, untried, monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_said", set())
    caplog.clear()
    for name, group in (("first", 96), ("second", 96), ("third", 512)):
        assert not isinstance(dispatch.bank(*some_digits(draw, 2, 64, 16, 32), group, name), gpu.BankWords)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[0] for line in lines] == ["first", "third"] and "scales for 96 inputs" in lines[0]


@pytest.mark.parametrize("tokens", [1, 17])
def test_any_rank_and_width_runs_on_the_kernels(gpu, draw, untried, tokens):
    A, B = some_digits(draw, 3, 64, 20, 40)
    x, selected = torch.randn(tokens, 64, generator=draw), torch.tensor([2, 0])
    scale, shift = torch.randn(2, 40, generator=draw)
    packed = dispatch.bank(A, B, 32)
    assert isinstance(packed, gpu.BankWords)
    y = dispatch.composed(packed, selected, scale, shift, 32)(x)
    assert torch.equal(y, reference.compose(x, A, B, selected, scale, shift, None, 32))
    packed, wide = dispatch.matrix(A[0], 0), torch.randn(20, generator=draw)
    assert isinstance(packed, gpu.MatrixWords)
    y = dispatch.multiplied(packed, wide)(x)
    assert y.shape == (tokens, 20) and torch.equal(y, reference.ternary_linear(x, A[0], wide))
