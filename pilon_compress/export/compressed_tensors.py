"""Exports matrices of integers in the format `pack-quantized` of compressed-tensors, which vLLM and transformers read.

    ours                  codes (d_in, d_out), a bfloat16 scale for 64 rows of a column (int8: for all of them)
    pack-quantized        codes (d_out, d_in) in words of 32 bits, a scale for each group along the inputs

The numbers are the same: nothing is rounded again.
"""

from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pilon_compress.config.export import ExportOptions
from pilon_compress.export import dense
from pilon_compress.export.integers import Integers, integer_layers, integers_of
from pilon_compress.export.native import factors
from pilon_compress.export.registry import DEFAULTS, ExportJob, exporter
from pilon_compress.export.save import companions_without_code
from pilon_compress.export.verify import difference, outputs
from pilon_compress.io import companions
from pilon_compress.io.folders import fresh_folder
from pilon_compress.models import checkpoint
from pilon_compress.models.quiet import quiet_transformers
from pilon_compress.nn.installed import layout_of
from pilon_compress.results.export import Exported


class PackedExported(Exported):
    """An export in the format of compressed-tensors."""

    bits: int
    """Bits of a number."""
    group: int
    """Numbers that share a scale; 0: all that make one output."""
    matrices: int
    """Matrices that are stored as integers."""
    bytes: int
    """Size of the folder's weights."""


def refuse(model: PreTrainedModel, options: ExportOptions = DEFAULTS) -> str | None:
    """Say why `model` cannot be stored so; None if it can."""
    if reason := dense.refuse(model, options) or factors(layout_of(model)):
        return reason
    found = integer_layers(model)
    if not found:
        return "holds no matrix of integers: convert with --bank-dtype int4 or int8 and --uniform-width"
    if find_spec("compressed_tensors") is None:
        return "cannot be packed without the library: pip install compressed-tensors"
    if len({one.format for one in found.values()}) > 1:
        return "mixes number formats, and a scheme names one"
    if dense.narrow_config(model, layout_of(model)) is None:
        return "has layers of different widths, which no stock config describes: convert with --uniform-width"
    uneven = [name for name, one in found.items() if one.grid.group and one.in_features % one.grid.group]
    if uneven:
        group = found[uneven[0]].grid.group
        return (
            f"has rows that are no multiple of its groups of {group} ({uneven[0]}): convert with --multiple-of {group}"
        )
    host = checkpoint.empty_model(model.config).base_model
    if not all(isinstance(host.get_submodule(name), torch.nn.Linear) for name in found):
        return "has projections that are no nn.Linear, the only layers that compressed-tensors packs"
    return None


@exporter(
    "compressed-tensors",
    about="Plain integer matrices as vLLM and transformers read them (pack-quantized); the rounding stays ours.",
    load="AutoModel.from_pretrained({folder!r})",
    refuse=refuse,
    options=(),
)
def write(model: PreTrainedModel, job: ExportJob) -> PackedExported:
    """Write the model; what was written is loaded again by transformers, and compared, before it is kept."""
    before = outputs(model)
    found = integers_of(model)
    one = next(iter(found.values()))
    packed = {name: packed_tensors(matrix) for name, matrix in found.items()}
    dense.to_dense(model)
    model.config.quantization_config = scheme(model, list(packed), one.bits, one.group)
    tokenizer, beside = checkpoint.load_tokenizer(job.source), companions_without_code(job.source)
    measured = dict[str, Any]()
    with fresh_folder(job.output, job.overwrite) as folder, quiet_transformers():
        model.save_pretrained(folder, state_dict=_state(model, packed))
        tokenizer.save_pretrained(folder)
        companions.copy(beside, folder)
        for path in folder.glob("*.safetensors"):
            path.chmod((folder / "config.json").stat().st_mode)  # safetensors writes for the owner only
        measured["bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        with redirect_stderr(StringIO()):  # the library shows bars of its own, also in its first pass
            measured["max_logit_difference"] = difference(_read(folder, model), before, "compressed-tensors")
    return PackedExported(**measured, bits=one.bits, group=one.group, matrices=len(packed))


def packed_tensors(matrix: Integers) -> dict[str, Tensor]:
    """Return the tensors of a layer by their names in `pack-quantized`."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return {
        "weight_packed": pack_to_int32(matrix.codes.to(torch.int8), matrix.bits),
        "weight_scale": matrix.scale,
        "weight_shape": torch.tensor(matrix.codes.shape, dtype=torch.int64),
    }


def scheme(model: PreTrainedModel, names: list[str], bits: int, group: int) -> dict[str, Any]:
    """Return the `quantization_config` of a plain `model` whose layers `names` are integers of so many `bits`."""
    linears = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    roles = sorted({name.rsplit(".", 1)[-1] for name in names})
    all_of = [name for name in linears if name.rsplit(".", 1)[-1] in roles]
    strategy: dict[str, Any] = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **strategy}
    targets = [rf"re:.*\.{role}$" for role in roles] if sorted(all_of) == sorted(names) else sorted(names)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": targets, "weights": weights}},
        "ignore": [name for name in linears if name not in names],
    }


def _state(model: PreTrainedModel, packed: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The model's tensors, with the packed ones in the place of weights."""
    state = {name: value for name, value in model.state_dict().items() if name.removesuffix(".weight") not in packed}
    for name, tensors in packed.items():
        state |= {f"{name}.{key}": value for key, value in tensors.items()}
    return state


def _read(folder: Path, like: PreTrainedModel) -> PreTrainedModel:
    """Load the folder as a user would, by the class of the model that it was written from."""
    with quiet_transformers():
        read: PreTrainedModel = type(like).from_pretrained(folder, dtype=like.dtype)
    return read
