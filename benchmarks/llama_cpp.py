"""Quantise a GGUF as llama.cpp's `llama-quantize` does for Q2_K or TQ1_0, by its own kernels in the wheel xllamacpp.

pip install xllamacpp gguf
python benchmarks/llama_cpp.py SmolLM2-135M-Instruct.Q4_1.gguf out/q2_k.gguf Q2_K
python benchmarks/llama_cpp.py SmolLM2-135M-Instruct.Q4_1.gguf out/tq1_0.gguf TQ1_0
pilon-compress eval out/q2_k.gguf --data TEXT

The wheel exports `ggml_quantize_chunk` and not `llama_model_quantize`, so the choice of types (llama-quant.cpp, without
an importance matrix) is repeated here for Llamas with tied embeddings. Rows that are no multiple of 256 fall back, as
there: K-quants to IQ4_NL, TQ1_0 to Q4_0, the head to Q8_0. Prints bytes by kind of tensor.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from pilon_compress.export.llama_cpp.tensors import by_ggml

BLOCK = 256  # numbers of a block of the K-quants and of TQ1_0
FALLBACK = {Kind.Q2_K: Kind.IQ4_NL, Kind.Q3_K: Kind.IQ4_NL, Kind.Q4_K: Kind.Q5_0, Kind.TQ1_0: Kind.Q4_0}
PLACES = {"ffn": "feed-forward", "attn": "attention", "token": "embedding"}


def kind_of(name: str, rows: int, asked: Kind, grouped: int) -> Kind:
    """Return the type of a tensor with `rows` numbers in a row; `grouped`: query heads for each key head."""
    if name == "token_embd.weight":  # the head as well
        return Kind.Q6_K if rows % BLOCK == 0 else Kind.Q8_0
    kind = asked
    if asked == Kind.Q2_K and ("attn_v" in name or "attn_output" in name or "ffn_down" in name):
        kind = Kind.Q4_K if "attn_v" in name and grouped >= 4 else Kind.Q3_K
    return kind if rows % BLOCK == 0 else FALLBACK[kind]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("output")
    parser.add_argument("kind", choices=["Q2_K", "TQ1_0"])
    asked = parser.parse_args()
    reader = gguf.GGUFReader(asked.source)
    fields = reader.fields

    def value(key: str) -> Any:
        return fields[key].contents()

    writer = gguf.GGUFWriter(asked.output, value("general.architecture"))
    for name, field in fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kinds = field.types
            sub = kinds[1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kinds[0], sub)
    grouped = value("llama.attention.head_count") // value("llama.attention.head_count_kv")
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        place = next((words for part, words in PLACES.items() if part in tensor.name), "rest")
        if weight.ndim < 2:
            writer.add_tensor(tensor.name, weight)
            sizes[f"{place} F32"] += weight.nbytes
            continue
        kind = kind_of(tensor.name, weight.shape[-1], Kind[asked.kind], grouped)
        data = by_ggml(weight, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
        sizes[f"{place} {kind.name}"] += data.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, size in sorted(sizes.items()):
        print(f"{name:24} {size:12,}")
    print(f"{'file':24} {Path(asked.output).stat().st_size:12,}")


if __name__ == "__main__":
    main()
