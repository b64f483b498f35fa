"""Exports to packed ternary weights, with everything else folded into one vector of scales per projection."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import pilon_compress
from pilon_compress.config.export import ExportOptions
from pilon_compress.export.registry import ExportJob, exporter
from pilon_compress.export.save import drop_bundled, save_beside
from pilon_compress.export.verify import outputs
from pilon_compress.models import checkpoint
from pilon_compress.models.provenance import lineage
from pilon_compress.nn.additions import carry
from pilon_compress.nn.formats.registry import FORMATS, Format
from pilon_compress.nn.installed import banks, dense_matrices, label_parts, layout_of, neuron_banks, projections
from pilon_compress.nn.layout import BANKS
from pilon_compress.nn.rest import round_rest
from pilon_compress.nn.size import model_size, target_ratios
from pilon_compress.report.card import packed_card
from pilon_compress.results.export import Exported
from pilon_compress.results.sizes import Sizes


def refuse(model: PreTrainedModel, options: ExportOptions) -> str | None:
    """Say why there is nothing to pack in `model`; None if there is."""
    layout = layout_of(model)
    if layout.routers:
        return (
            "has experts, which the packed kernels do not route: it computes as it is, or export `--to self-contained`"
        )
    if layout.kinds <= {kind.packs for kind in FORMATS.values()}:
        return None
    if all(FORMATS[name].final for name in layout.kinds):
        done = options.rest in (None, "none") or layout.rest
        return "is packed already" if done else None
    return (
        "is not ternary: `pilon-compress train --heal ... --ternary` makes it so; "
        "`convert --bank-dtype int4` makes integers"
    )


@exporter(
    "packed",
    about="Ternary weights in 1.6 or 2 bits; with --rest, attention, head and embeddings in 8 or 4 bits.",
    load="AutoModel.from_pretrained({folder!r})",
    refuse=refuse,
    options=("encoding", "rest", "dtype"),
    dtype_when_saved=True,  # rounding to fewer bits first would move ternary weights
)
def write(model: PreTrainedModel, job: ExportJob) -> Exported:
    """Write `model` with its ternary weights packed, `encoding` base3 or 2bit, and with `rest` all else rounded.

    `dtype`: of what is neither ternary nor a scale. Of a model in integers the rest is all that is left to round.
    """
    dtype = checkpoint.find_dtype(job.options.dtype or "auto") or model.dtype
    before = outputs(model)
    if not all(FORMATS[name].final for name in layout_of(model).kinds):
        packed(model, job.options.encoding or "base3")
    after = outputs(model)
    found: dict[str, Any] = {"max_logit_difference": float((after - before).abs().max())}
    if job.options.rest not in (None, "none"):
        round_rest(model, job.options.rest)
        found["rest"] = job.options.rest
        found["rest_relative_error"] = float((outputs(model) - after).norm() / after.norm())
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
    """Replace, in place, every bank and matrix of a format in training by its packed one; outputs stay bit-equal.

    `encoding`: the packed format is called FORMAT-ENCODING.
    """

    def packing(part: Any) -> Format:
        return FORMATS[f"{part.format}-{encoding}"]

    made = {id(bank): (name, packing(bank).pack_bank(bank)) for name, bank in banks(model)}
    for name, layer in list(projections(model)):
        projection = packing(layer.bank).pack_projection(layer, made[id(layer.bank)][1])
        model.base_model.set_submodule(name, carry(layer, projection))
    for name, matrix in list(dense_matrices(model)):
        model.base_model.set_submodule(name, carry(matrix, packing(matrix).pack_matrix(matrix)))
    for _, store in neuron_banks(model):
        made_of = {role: packing(one).pack_matrix(one) for role, one in store.matrices()}
        store.become(f"{store.format}-{encoding}", made_of)
    for name, bank in made.values():
        model.base_model.set_submodule(f"{BANKS}.{name}", bank)
    label_parts(model)
    return model.eval()


def size_of(model: PreTrainedModel, itemsize: int) -> dict[str, Sizes]:
    """Sizes of what is replaced, and of `model`, with so many bytes per plain number, over the dense bfloat16 model."""
    layout, dense = layout_of(model), checkpoint.empty_model(model.config)
    return {
        **target_ratios(layout, itemsize),
        "model": model_size(layout, dense, itemsize).over_dense(),
    }
