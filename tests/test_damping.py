"""Singular second moments: the plain factor where there is one, a finite one elsewhere, one line for what is none."""

import pytest
import torch
from safetensors.torch import load_file

from pilon_compress.config.conversion import build
from pilon_compress.convert.calibrate.damping import damped_cholesky, damped_inverse, damped_solve
from pilon_compress.convert.pipeline import convert
from pilon_compress.convert.solve.low_rank import Target
from pilon_compress.convert.solve.neuron_pruning import eliminate, refit
from pilon_compress.convert.solve.sequential_targets import CrossMoments
from pilon_compress.errors import BadInput


def gram(rows, d=12, dtype=torch.float64):
    x = torch.randn(rows, d, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return x.T @ x


@pytest.mark.parametrize("upper", [False, True])
def test_a_plain_factor_stays_bit_for_bit(upper):
    matrix = gram(40)
    assert torch.equal(damped_cholesky(matrix, upper=upper), torch.linalg.cholesky(matrix, upper=upper))
    right = gram(3)
    assert torch.equal(damped_solve(matrix, right), torch.linalg.solve(matrix, right))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [1, 3, 11])
def test_a_rank_deficient_moment_is_damped_as_little_as_needed(rows, dtype):
    matrix = gram(rows, dtype=dtype)
    matrix -= 1e-5 * matrix.diagonal().mean() * torch.eye(12, dtype=dtype)  # what rounding may leave, and more
    factor = damped_cholesky(matrix)
    assert factor.isfinite().all()
    torch.testing.assert_close(factor @ factor.T, matrix, rtol=0, atol=1e-3 * float(matrix.diagonal().mean()))
    assert damped_inverse(matrix).isfinite().all()


def test_zeros_and_a_single_one():
    assert torch.equal(damped_cholesky(torch.zeros(5, 5)), torch.eye(5))
    assert damped_cholesky(torch.tensor([[4.0]])).item() == 2
    assert torch.equal(damped_solve(torch.zeros(3, 3), torch.zeros(3, 2)), torch.zeros(3, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(value):
    matrix = gram(40)
    matrix[2, 3] = matrix[3, 2] = value
    with pytest.raises(BadInput, match="of layers.1.mlp.down_proj are NaN or infinite"):
        damped_cholesky(matrix, "layers.1.mlp.down_proj")
    with pytest.raises(BadInput, match="no second moment"):
        damped_cholesky(-gram(40))


def test_inputs_that_never_vary_leave_the_weight_alone():
    weight = torch.randn(6, 4, dtype=torch.float64)
    start = Target("down", 0, weight, torch.eye(6, dtype=torch.float64))
    cross = CrossMoments.empty(6, 4, torch.zeros(1))
    cross.update(torch.zeros(10, 6), torch.randn(10, 4))
    for centred in (True, False):
        assert torch.equal(cross.target(start, centred).weight, weight)


def test_equal_neurons_are_eliminated_and_the_others_refitted():
    """Neurons that say the same have a singular moment: one of each two can go at no cost."""
    half = gram(40, 6)
    inputs, weight = half.repeat(2, 2), torch.randn(12, 5, dtype=torch.float64)
    order = eliminate(weight, inputs, torch.eye(5, dtype=torch.float64))
    assert sorted(order.order.tolist()) == list(range(12)) and order.cost.isfinite().all()
    assert order.loss(6) < 1e-3 * order.loss(1)
    left = order.left(6)
    rows = refit(weight, inputs, left)
    error = weight.clone()
    error[left] -= rows
    assert float(((inputs @ error) * error).sum()) < 1e-6 * float(((inputs @ weight) * weight).sum())


def silence(model):
    """No neuron of any block ever fires: a ReLU behind a bias far below zero."""
    for layer in model.model.decoder.layers:
        layer.fc1.bias.fill_(-100)


def zero(model):
    for layer in model.model.layers[1:2]:
        layer.mlp.gate_proj.weight.zero_()
        layer.mlp.up_proj.weight.zero_()


def empty(model):
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.zero_()


@pytest.mark.parametrize(
    "family, damage, options",
    [
        ("opt", silence, {}),
        ("llama", zero, {}),
        ("llama", zero, {"form": {"bank_dtype": "int4"}}),
        ("llama", empty, {}),
        ("llama", None, {"calibration": {"samples": 1, "sequence_length": 2, "batch_size": 1}}),
    ],
    ids=["dead ReLUs", "dead layer", "dead layer, int4", "inputs of zeros", "two tokens"],
)
def test_degenerate_layers_convert_to_finite_weights(tiny, tmp_path, family, damage, options):
    model = tiny.save_tiny(family, tmp_path / "dense")
    if damage is not None:
        with torch.no_grad():
            damage(model)
        model.save_pretrained(tmp_path / "dense")
    paragraphs = (
        f"Paragraph {i} tells of many things, and of nothing else but the very things that it names." for i in range(60)
    )
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs))
    calibration = {"data": str(tmp_path / "text.txt"), "samples": 8, "sequence_length": 32, "batch_size": 8}
    calibration |= options.get("calibration", {})
    settings = {"model": str(tmp_path / "dense"), "budget": {"ffn_ratio": 0.5}, "evaluation": {"data": "none"}}
    report = convert(build({**settings, **options, "calibration": calibration}), tmp_path / "out").dump()
    assert report["ffn"]["stored_ratio"] <= 0.5
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())
