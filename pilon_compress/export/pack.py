"""Packing: a trained ternary model as digits in bytes, with everything else folded into one vector per projection."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import pilon_compress
from pilon_compress.errors import BadInput
from pilon_compress.export.export import MODELING_FILE, drop_bundled, load_pilon
from pilon_compress.export.save import save_model
from pilon_compress.io import companions
from pilon_compress.io.folders import fresh_folder, open_output
from pilon_compress.models import checkpoint
from pilon_compress.models.provenance import lineage
from pilon_compress.models.task import vocabulary
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

SAMPLE = (2, 48)  # sequences and tokens on which packed and unpacked are compared


def export_packed(
    source: str,
    output: Path,
    *,
    encoding: str = "base3",
    rest: str = "none",
    dtype: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a ternary model with its digits packed, `encoding` 2bit or base3. It loads through `from_pretrained`.

    `dtype`: of what is neither digits nor their scales. `rest` int8: attention, head and token embeddings in 8 bits
    (`form.int8`); of a model in whole numbers that is all.
    Returns `ffn` and `model` (sizes and their ratios over the dense model in bfloat16, bytes as on disk) and
    `max_logit_difference` on random tokens, in float32, of packing; `rest_relative_error` is that of outputs by
    rounding the rest. Raises BadInput for a model that is not ternary.
    """
    with open_output(output, overwrite, source) as path:
        return _export_packed(source, path, encoding, rest, dtype, overwrite)


def _export_packed(source: str, output: Path, encoding: str, rest: str, dtype: str, overwrite: bool) -> dict[str, Any]:
    wanted = checkpoint.find_dtype(dtype)
    model = load_pilon(source, "auto")  # narrower only once they are digits, which rounding would move
    ternary = check_packable(model, source, rest)
    kept_dtype = wanted or model.dtype
    before = _outputs(model)
    if ternary:
        packed(model, encoding)
    after = _outputs(model)
    found: dict[str, Any] = {"max_logit_difference": float((after - before).abs().max())}
    if rest == "int8":
        to_int8(model)
        found["rest_relative_error"] = float((_outputs(model) - after).norm() / after.norm())
    tokenizer, beside = checkpoint.load_tokenizer(source), companions.find(checkpoint.resolve(source))
    drop_bundled(model.config)
    beside.pop(MODELING_FILE, None)
    with fresh_folder(output, overwrite) as folder:
        save_model(model, tokenizer, folder, kept_dtype)
        companions.copy(beside, folder)
        size = size_of(model, kept_dtype.itemsize)
        about = {
            "source": source,
            "dense": lineage(checkpoint.resolve(source)).dense,
            "output": str(output),
            "kind": "causal" if model.can_generate() else "encoder",
            "formats": sorted(layout_of(model).kinds),
            "pilon_compress": pilon_compress.__version__,
        }
        (folder / "README.md").write_text(packed_card({**about, **size, **found}), encoding="utf-8")
    return {**size, **found}


def check_packable(model: PreTrainedModel, source: str, rest: str) -> bool:
    """Whether every bank and kept matrix is ternary. Raises BadInput where there is nothing to pack."""
    found = [bank for _, bank in banks(model)] + [matrix for _, matrix in kept_matrices(model)]
    if all(isinstance(one, TernaryBank | TernaryLinear) for one in found):
        return True
    if all(isinstance(one, PackedBank | PackedLinear | IntegerBank | IntegerLinear) for one in found):
        if rest == "none" or layout_of(model).rest:
            raise BadInput(f"{source} is packed already")
        return False
    raise BadInput(
        f"{source} is not ternary: `pilon-compress train --heal {source} --ternary` makes it so; "
        "`convert --bank-dtype int4` makes whole numbers"
    )


@torch.no_grad()
def packed(model: PreTrainedModel, encoding: str) -> PreTrainedModel:
    """Replace, in place, every ternary bank and matrix of `model` by a packed one; outputs stay bit-equal."""
    made = {id(bank): (name, bank, _bank(bank, encoding)) for name, bank in banks(model)}
    for name, layer in list(projections(model)):
        model.base_model.set_submodule(name, _projection(layer, made[id(layer.bank)][2]))
    for name, matrix in list(kept_matrices(model)):
        model.base_model.set_submodule(name, _matrix(matrix, encoding))
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
    scale, shift = layer.bank.folded(selected, weight)
    k, rank = len(selected), bank.rank
    made = ComposedLinear(
        bank, k, layer.bias is not None, "component", layer.host_shape, layer.group, layer.norm is not None,
        shift is not None,
    )  # fmt: skip
    made.selected = selected.clone()
    made.weight = nn.Parameter(scale.reshape(k, rank).clone())
    if made.shift is not None and shift is not None:
        made.shift = nn.Parameter(shift.reshape(k, rank).clone())
    made.bias, made.norm = layer.bias, layer.norm
    return made


def _matrix(matrix: Kept, encoding: str) -> PackedLinear:
    assert isinstance(matrix, TernaryLinear)
    scale = matrix.scales()
    d_in, d_out = matrix.in_features, matrix.out_features
    made = PackedLinear(
        d_in, d_out, matrix.bias is not None, matrix.host_shape, encoding, matrix.group, matrix.norm is not None
    )
    made.codes = pack(digits(matrix.weight, scale).T[None], encoding)
    made.weight = nn.Parameter(scale.squeeze(-1).expand(d_out).clone())
    made.bias, made.norm = matrix.bias, matrix.norm
    return made


@torch.no_grad()
def _outputs(model: PreTrainedModel) -> torch.Tensor:
    """Logits, or of an encoder the last states, on random tokens."""
    ids = torch.randint(0, vocabulary(model.config), SAMPLE, generator=torch.Generator().manual_seed(0))
    return model.eval()(input_ids=ids.to(model.device))[0].float()


def size_of(model: PreTrainedModel, itemsize: int) -> dict[str, Any]:
    """`ffn` and `model` as `nn.size` counts them, with so many bytes a plain number."""
    layout, dense = layout_of(model), checkpoint.empty_model(model.config)
    return {
        "ffn": ffn_size(layout, itemsize).to_dict(),
        "model": model_size(layout, dense, itemsize).to_dict(),
    }
