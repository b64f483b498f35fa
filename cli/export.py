"""`pilon-compress export`: a PILON model in a form that other tools load."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .output import print_json


class Form(str, Enum):
    """What to export to."""

    dense = "dense"
    self_contained = "self-contained"


def export(
    model: Annotated[str, typer.Argument(help="PILON model folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must be new or empty.")],
    to: Annotated[
        Form,
        typer.Option(help="dense: plain host model, no trace of PILON. self-contained: brings its loading code along."),
    ],
    dtype: Annotated[str, typer.Option(help="Of a dense export: auto, float32, bfloat16, float16.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Export a PILON model: dense (loads everywhere) or self-contained (loads without this package).

    pilon-compress export out/gpt2-half --to dense -o out/gpt2-half-dense
    """
    from pilon_compress.deploy.export import export_dense, export_self_contained

    if to is Form.dense:
        export_dense(model, output, dtype=dtype, overwrite=overwrite)
        load = f"AutoModel.from_pretrained({str(output)!r})"
    else:
        export_self_contained(model, output, overwrite=overwrite)
        load = f"AutoModel.from_pretrained({str(output)!r}, trust_remote_code=True)"
    if as_json:
        print_json({"model": model, "output": str(output), "to": to.value, "load": load})
    else:
        print(output)
        print(f"loads with {load}")
