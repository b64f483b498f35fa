"""`pilon-compress export`: a PILON model in a form that other tools load."""

from pathlib import Path
from typing import Annotated

import typer

from pilon_compress.errors import BadInput

from .output import print_json, print_table


def export(
    model: Annotated[str, typer.Argument(help="PILON model folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; must be new or empty.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="The form to write, such as dense, self-contained or packed; see --list.")
    ] = None,
    encoding: Annotated[
        str | None,
        typer.Option("--format", help="Of packed ternary weights: base3 (1.6 bits each, the default) or 2bit."),
    ] = None,
    rest: Annotated[
        str | None,
        typer.Option(help="Of a packed export: int8 quantises attention, head and token embeddings. Default: none."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. Default: auto, that of the model."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    list_targets: Annotated[
        bool, typer.Option("--list", help="Print every form, and whether MODEL can be written in it; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Export a PILON model to a form that other tools load.

    pilon-compress export out/gpt2-half --list
    pilon-compress export out/gpt2-half --to dense -o out/gpt2-half-dense
    """
    from pilon_compress.export.registry import EXPORTERS, Options
    from pilon_compress.export.run import export as write
    from pilon_compress.export.run import target_table

    if list_targets:
        print_table(model, *target_table(model))
        return
    if to is None:
        raise BadInput(f"name the form to write with --to: {', '.join(EXPORTERS)}")
    if output is None:
        raise BadInput("name the folder to write with -o")
    options = Options(dtype=dtype, encoding=encoding, rest=rest)
    found = write(model, output, to, options, overwrite=overwrite)
    load = EXPORTERS[to].load.format(folder=str(output))
    if as_json:
        print_json({"model": model, "output": str(output), "to": to, "load": load, **found})
        return
    print(output)
    if "ffn" in found:
        ffn, whole = found["ffn"]["bytes_ratio"], found["model"]["bytes_ratio"]
        print(f"feed-forward bytes {ffn:.4f} of bfloat16 dense, the whole model {whole:.3f}")
    if "max_logit_difference" in found:
        print(f"largest difference of outputs {found['max_logit_difference']:.3g}")
    if "rest_relative_error" in found:
        print(f"outputs moved by {found['rest_relative_error']:.3g} of their norm by rounding the rest")
    print(f"loads with {load}")
