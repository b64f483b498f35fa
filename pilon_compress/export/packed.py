"""Exports to packed ternary weights, with everything else folded into one vector of scales per projection."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import pilon_compress
from pilon_compress.config.export import ExportOptions
from pilon_compress.export.registry import Job, exporter
from pilon_compress.export.save import drop_bundled, save_beside
from pilon_compress.models import checkpoint
from pilon_compress.models.provenance import lineage
from pilon_compress.models.task import vocabulary
from pilon_compress.nn.additions import added, addition, carry
from pilon_compress.nn.bank import PrimitiveBank
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.int8 import to_int8
from pilon_compress.nn.integer import IntegerBank, IntegerLinear
from pilon_compress.nn.layout import BANKS, Kept, banks, kept_matrices, layout_of, projections
from pilon_compress.nn.packed_ternary import PackedBank, PackedLinear
from pilon_compress.nn.size import ffn_size, model_size
from pilon_compress.nn.ternary import TernaryBank, TernaryLinear
from pilon_compress.nn.ternary_codec import pack
from pilon_compress.nn.ternary_quantizer import digits
from pilon_compress.report.card import packed_card
from pilon_compress.results.export import Exported
from pilon_compress.results.sizes import Sizes

SAMPLE = (2, 48)  # sequences and tokens on which packed and unpacked are compared


def refuse(model: PreTrainedModel, options: ExportOptions) -> str | None:
    """Say why there is nothing to pack in `model`; None if there is."""
    found = [bank for _, bank in banks(model)] + [matrix for _, matrix in kept_matrices(model)]
    if all(isinstance(one, TernaryBank | TernaryLinear) for one in found):
        return None
    if all(isinstance(one, PackedBank | PackedLinear | IntegerBank | IntegerLinear) for one in found):
        done = options.rest != "int8" or layout_of(model).rest
        return "is packed already" if done else None
    return (
        "is not ternary: `pilon-compress train --heal ... --ternary` makes it so; "
        "`convert --bank-dtype int4` makes integers"
    )


@exporter(
    "packed",
    about="Ternary weights in 1.6 or 2 bits; with --rest int8, attention, head and embeddings in 8 bits as well.",
    load="AutoModel.from_pretrained({folder!r})",
    refuse=refuse,
    options=("encoding", "rest", "dtype"),
    dtype_when_saved=True,  # rounding to fewer bits first would move ternary weights
)
def write(model: PreTrainedModel, job: Job) -> Exported:
    """Write `model` with its ternary weights packed, `encoding` base3 or 2bit, and with `rest` int8 all else rounded.

    `dtype`: of what is neither ternary nor a scale. Of a model in integers the rest is all that is left to round.
    """
    dtype = checkpoint.find_dtype(job.options.dtype or "auto") or model.dtype
    before = _outputs(model)
    if layout_of(model).is_ternary:
        packed(model, job.options.encoding or "base3")
    after = _outputs(model)
    found: dict[str, Any] = {"max_logit_difference": float((after - before).abs().max())}
    if job.options.rest == "int8":
        to_int8(model)
        found["rest_relative_error"] = float((_outputs(model) - after).norm() / after.norm())
    drop_bundled(model.config)
    result = Exported.model_validate(found | size_of(model, dtype.itemsize))
    about = {
        "source": job.source,
        "dense": lineage(checkpoint.resolve(job.source)).dense,
        "output": str(job.output),
        "kind": "causal" if model.can_generate() else "encoder",
        "formats": sorted(layout_of(model).kinds),
        "pilon_compress": pilon_compress.__version__,
    }

    def add(folder: Path) -> None:
        (folder / "README.md").write_text(packed_card({**about, **result.dump()}), encoding="utf-8")

    save_beside(model, job, dtype, add)
    return result


@torch.no_grad()
def packed(model: PreTrainedModel, encoding: str) -> PreTrainedModel:
    """Replace, in place, every ternary bank and matrix of `model` by a packed one; outputs stay bit-equal."""
    made = {id(bank): (name, bank, _bank(bank, encoding)) for name, bank in banks(model)}
    for name, layer in list(projections(model)):
        model.base_model.set_submodule(name, carry(layer, _projection(layer, made[id(layer.bank)][2])))
    for name, matrix in list(kept_matrices(model)):
        model.base_model.set_submodule(name, carry(matrix, _matrix(matrix, encoding)))
    for name, _, bank in made.values():
        model.base_model.set_submodule(f"{BANKS}.{name}", bank)
    return model.eval()


def _bank(bank: PrimitiveBank, encoding: str) -> PackedBank:
    assert isinstance(bank, TernaryBank)
    A, B = bank.eval().digits(torch.arange(bank.n_primitives, device=bank.A.device))
    made = PackedBank(bank.d_in, bank.d_out, bank.n_primitives, bank.rank, encoding)
    made.A_codes, made.B_codes = pack(A, encoding), pack(B, encoding)
    return made


def _projection(layer: ComposedLinear, bank: PackedBank) -> ComposedLinear:
    selected, weight = layer.coefficients()
    assert isinstance(layer.bank, TernaryBank)
    scale, _ = layer.bank.folded(selected, weight)
    k, rank = len(selected), bank.rank
    made = ComposedLinear(bank, k, layer.bias is not None, "component", layer.host_shape, layer.group)
    made.selected = selected.clone()
    made.weight = nn.Parameter(scale.reshape(k, rank).clone())
    made.bias = layer.bias
    for name, kind in added(layer.bank):
        addition(name, kind).packed(layer, made)
    return made


def _matrix(matrix: Kept, encoding: str) -> PackedLinear:
    assert isinstance(matrix, TernaryLinear)
    scale = matrix.scales()
    d_in, d_out = matrix.in_features, matrix.out_features
    made = PackedLinear(d_in, d_out, matrix.bias is not None, matrix.host_shape, encoding, matrix.group)
    made.codes = pack(digits(matrix.weight, scale).T[None], encoding)
    made.weight = nn.Parameter(scale.squeeze(-1).expand(d_out).clone())
    made.bias = matrix.bias
    return made


@torch.no_grad()
def _outputs(model: PreTrainedModel) -> torch.Tensor:
    """Logits, or of an encoder the last states, on random tokens."""
    ids = torch.randint(0, vocabulary(model.config), SAMPLE, generator=torch.Generator().manual_seed(0))
    return model.eval()(input_ids=ids.to(model.device))[0].float()


def size_of(model: PreTrainedModel, itemsize: int) -> dict[str, Sizes]:
    """Sizes of `ffn` and `model`, with so many bytes per plain number, over the dense model in bfloat16."""
    layout, dense = layout_of(model), checkpoint.empty_model(model.config)
    return {
        "ffn": ffn_size(layout, itemsize).over_dense(),
        "model": model_size(layout, dense, itemsize).over_dense(),
    }
