"""Exports to a GGUF file, which llama.cpp, Ollama and LM Studio run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pilon_compress.config.export import ExportOptions
from pilon_compress.export import deci, dense
from pilon_compress.export.integers import Integers, integers_of
from pilon_compress.export.llama_cpp import architectures, runtime, tensors, vocabulary
from pilon_compress.export.native import factors
from pilon_compress.export.registry import DEFAULTS, ExportJob, exporter
from pilon_compress.export.save import companions_without_code
from pilon_compress.export.verify import ExportFailed
from pilon_compress.io import companions
from pilon_compress.io.folders import fresh_folder
from pilon_compress.models import checkpoint
from pilon_compress.nn.installed import layout_of
from pilon_compress.results.export import Exported

SUFFIX = ".gguf"
WRITES: dict[int, tensors.Type] = {4: "q4_0", 8: "q8_0"}  # types that hold integers of so many bits as they are
FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
    "q4_k_m": "MOSTLY_Q4_K_M",
    "tq1_0": "MOSTLY_TQ1_0",
    "tq2_0": "MOSTLY_TQ2_0",
}


class GgufExported(Exported):
    """An export to a GGUF file."""

    file: str = ""
    """Name of the file in the folder."""
    architecture: str = ""
    """llama.cpp's name of the architecture."""
    type: str = ""
    """Type of the matrices that was asked for."""
    types: dict[str, int] = {}
    """Tensors by the type that they got; rows that do not fill a block get another than was asked for."""
    bytes: int = 0
    """Size of the file."""
    integers_kept: int = 0
    """Matrices whose integers and scales are those of the conversion, not rounded again."""
    load_seconds: float | None = None
    """Seconds in which llama.cpp loads it."""
    difference_as_written: float | None = None
    """Largest difference of llama.cpp's outputs to those of transformers with the weights that the file has."""
    verified: bool = False
    """True if llama.cpp loaded the file and computes what it should."""
    unverified: str = ""
    """Why it was not verified."""


def refuse(model: PreTrainedModel, options: ExportOptions = DEFAULTS) -> str | None:
    """Say why `model` cannot become a GGUF file; None if it can."""
    if reason := dense.refuse(model, options) or factors(layout_of(model)):
        return reason
    if model.config.model_type == "bert" and type(model).__name__ != "BertModel":
        return "has a head, which llama.cpp's bert has no place for: it computes embeddings"
    if model.config.model_type != "bert" and not model.can_generate():
        return "writes no text and is no BERT: GGUF files are written of causal language models and BERT encoders"
    if reason := architectures.refuse(model.config):
        return reason
    if options.type == "q4_k_m" and not runtime.available():
        return "cannot be rounded to q4_k_m without llama.cpp's quantiser: pip install xllamacpp"
    if dense.narrow_config(model, layout_of(model)) is None and model.config.model_type not in ("llama", "mistral"):
        return (
            f"has layers of different widths, which llama.cpp reads of Llamas alone, not of {model.config.model_type}: "
            "convert with --uniform-width"
        )
    return None


def refuse_source(source: str, model: PreTrainedModel) -> str | None:
    """Say why the tokenizer beside the model cannot be written; None if it can."""
    return vocabulary.refuse(Path(checkpoint.resolve(source)), encoder=model.config.model_type == "bert")


@exporter(
    "gguf",
    about="One GGUF file for llama.cpp, Ollama and LM Studio, with the tokenizer and the chat template.",
    load="llama-server -m {folder}/*.gguf",
    refuse=refuse,
    options=("type",),
    refuse_source=refuse_source,
)
def write(model: PreTrainedModel, job: ExportJob) -> GgufExported:
    """Write the file; where llama.cpp is installed, it loads it, and tokens and logits are compared before it stays."""
    uniform, integers = dense.narrow_config(model, layout_of(model)) is not None, integers_of(model)
    model = model.float()
    dense.to_dense(model) if uniform else deci.to_plain(model)
    source = Path(checkpoint.resolve(job.source))
    kind: tensors.Type = job.options.type or WRITES.get(next((one.bits for one in integers.values()), 0), "f16")
    measured: dict[str, Any] = {"type": kind}
    beside = companions_without_code(job.source)
    with fresh_folder(job.output, job.overwrite) as folder:
        companions.copy(beside, folder)
        path = folder / f"{job.output.name}-{kind.upper()}{SUFFIX}"
        measured["architecture"], measured["types"] = write_file(path, model, kind, source, integers)
        measured["integers_kept"] = sum(tensors.fits(one, kind.upper()) for one in integers.values())
        measured |= {"file": path.name, "bytes": path.stat().st_size}
        measured |= verify(path, model, job.source, kind, integers)
    remarks = _remarks({**measured, "integers": len(integers)})
    return GgufExported(**measured, remarks=remarks)


def _remarks(measured: dict[str, Any]) -> list[str]:
    """Say what was written, and by what it was verified."""
    kinds = ", ".join(f"{count} of {kind}" for kind, count in measured["types"].items())
    loaded = f", loaded in {measured['load_seconds']:.1f} s" if "load_seconds" in measured else ""
    kept, total = measured["integers_kept"], measured["integers"]
    rounding = f"; {kept} of {total} matrices of integers kept as they are" if total else ""
    verified = f"NOT VERIFIED: {measured.get('unverified')}"
    if measured["verified"]:
        difference = f"{measured['difference_as_written']:.2g}"
        verified = f"verified by llama.cpp: it differs by {difference} from the file's weights in transformers{loaded}"
    return [
        f"{measured['file']}: {measured['bytes'] / 1e6:,.1f} MB, architecture {measured['architecture']}",
        f"tensors: {kinds}{rounding}",
        verified,
    ]


def widths_of(model: PreTrainedModel) -> list[int]:
    """Return the neurons of each layer of a plain model."""
    text, layers = model.config, model.config.num_hidden_layers
    if text.model_type in architectures.LEARNED:
        return [getattr(text, "n_inner", None) or getattr(text, "intermediate_size", 4 * text.hidden_size)] * layers
    return [int(layer.mlp.down_proj.in_features) for layer in model.base_model.layers]


def pooling_of(source: Path) -> str:
    """Return how an encoder's folder pools its states: by its sentence-transformers config, or else their mean."""
    path = source / "1_Pooling" / "config.json"
    told = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return "cls" if told.get("pooling_mode_cls_token") or told.get("pooling_mode") == "cls" else "mean"


def write_file(
    path: Path, model: PreTrainedModel, kind: tensors.Type, source: Path, integers: Mapping[str, Integers] | None = None
) -> tuple[str, dict[str, int]]:
    """Write a plain transformers `model` with the tokenizer of the folder `source`, tensor by tensor.

    integers: matrices that the conversion rounded; where `kind` holds their numbers, they are written as they are
    Returns llama.cpp's name of the architecture, and the number of tensors of each type.
    """
    import gguf

    arch = architectures.describe(model, widths_of(model))
    writer, counts = gguf.GGUFWriter(path, arch.name), dict[str, int]()
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(str(getattr(model.config, "_name_or_path", "") or path.stem).rsplit("/", 1)[-1])
    for key, value in arch.keys.items():
        full = f"{arch.name}.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, list):
            writer.add_array(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        else:
            writer.add_uint32(full, value)
    if arch.name == "bert":
        writer.add_pooling_type(gguf.PoolingType[pooling_of(source).upper()])
    writer.add_file_type(int(gguf.LlamaFileType[FILE_TYPES[kind]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocabulary.add_vocabulary(writer, source, model.config.vocab_size)
    for one in tensors.tensors(model, arch, kind, model.config.num_hidden_layers, integers or {}):
        writer.add_tensor(one.name, one.data, raw_dtype=gguf.GGMLQuantizationType[one.kind])
        counts[one.kind] = counts.get(one.kind, 0) + 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arch.name, counts


def verify(
    path: Path, model: PreTrainedModel, source: str, kind: tensors.Type, integers: Mapping[str, Integers]
) -> dict[str, Any]:
    """Compare the file in llama.cpp with the model, which is rounded in place as the file is.

    Raises ExportFailed where it computes something else.
    """
    if not runtime.available():
        return {"verified": False, "unverified": "llama.cpp is not installed (pip install xllamacpp)"}
    arch, layers = architectures.describe(model, widths_of(model)), model.config.num_hidden_layers

    def as_written() -> None:
        tensors.round_as_written(model, arch, kind, layers, integers)

    tokenizer = checkpoint.load_tokenizer(source)
    if model.config.model_type == "bert":
        pooling = pooling_of(Path(checkpoint.resolve(source)))
        found = runtime.verify_encoder(path, model, tokenizer, kind, pooling, as_written)
    else:
        found = runtime.verify(path, model, tokenizer, kind, as_written)
    if not found.tokens_agree:
        raise ExportFailed("llama.cpp splits or begins text otherwise than the tokenizer does: nothing is written")
    if not found.difference <= found.allowed:
        raise ExportFailed(
            f"llama.cpp computes something else from the file, by {found.difference:.3g}: nothing is written"
        )
    return {
        "max_logit_difference": found.rounding,
        "difference_as_written": found.difference,
        "load_seconds": found.load_seconds,
        "verified": True,
    }
