"""`pilon-compress export`: a PILON model in a form that other tools load."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import print_json


class Form(str, Enum):
    """What to export to."""

    dense = "dense"
    self_contained = "self-contained"
    packed = "packed"


class Encoding(str, Enum):
    """How ternary digits become bytes."""

    base3 = "base3"
    two_bits = "2bit"


class Rest(str, Enum):
    """What everything but the feed-forward weights becomes."""

    none = "none"
    int8 = "int8"


def export(
    model: Annotated[str, typer.Argument(help="PILON model folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must be new or empty.")],
    to: Annotated[
        Form,
        typer.Option(
            help="dense: plain host model, no trace of PILON. self-contained: brings its loading code along. "
            "packed: ternary digits in bytes."
        ),
    ],
    encoding: Annotated[
        Encoding, typer.Option("--format", help="Of a packed export: base3, 1.6 bits a digit; 2bit.")
    ] = Encoding.base3,
    rest: Annotated[
        Rest, typer.Option(help="Of a packed export: int8 for attention, head and token embeddings too.")
    ] = Rest.none,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16; not self-contained.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Export a PILON model: dense (loads everywhere), self-contained (loads without this package), packed (ternary).

    pilon-compress export out/gpt2-half --to dense -o out/gpt2-half-dense
    """
    found: dict[str, Any] = {}
    from pilon_compress.export.export import export_dense, export_self_contained

    if to is Form.dense:
        export_dense(model, output, dtype=dtype, overwrite=overwrite)
        load = f"AutoModel.from_pretrained({str(output)!r})"
    elif to is Form.packed:
        from pilon_compress.export.pack import export_packed

        found = export_packed(model, output, encoding=encoding.value, rest=rest.value, dtype=dtype, overwrite=overwrite)
        load = f"AutoModel.from_pretrained({str(output)!r})"
    else:
        export_self_contained(model, output, overwrite=overwrite)
        load = f"AutoModel.from_pretrained({str(output)!r}, trust_remote_code=True)"
    if as_json:
        print_json({"model": model, "output": str(output), "to": to.value, "load": load, **found})
    else:
        print(output)
        if found:
            ffn, whole = found["ffn"]["bytes_ratio"], found["model"]["bytes_ratio"]
            print(f"feed-forward bytes {ffn:.4f} of bfloat16 dense, the whole model {whole:.3f}")
            print(f"largest difference of outputs {found['max_logit_difference']:.3g}")
            if rest is Rest.int8:
                print(f"outputs moved by {found['rest_relative_error']:.3g} of their norm by rounding the rest")
        print(f"loads with {load}")
