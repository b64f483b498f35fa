"""`pilon-compress export`: a PILON model in a form that other tools load."""

from typing import Annotated, Any

import typer

from pilon_compress.config.export import ExportConfig
from pilon_compress.errors import BadInput

from .options import configured
from .output import print_json, print_table, say
from .parameters import Json, Output, Overwrite, named

List = Annotated[
    bool, typer.Option("--list", help="Print every form, and whether MODEL can be written in it; write nothing.")
]


@configured(ExportConfig)
def export(
    settings: ExportConfig,
    output: Output = None,
    list_targets: List = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Export a PILON model to a form that other tools load.

    pilon-compress export out/gpt2-half --list
    pilon-compress export out/gpt2-half --to dense -o out/gpt2-half-dense
    pilon-compress export out/gpt2-elastic --keep 0.7 -o out/gpt2-cut
    """
    from pilon_compress.export.registry import EXPORTERS
    from pilon_compress.export.run import export as write
    from pilon_compress.export.run import target_table

    if list_targets:
        print_table(settings.model, *target_table(settings.model, settings))
        return
    form = settings.to or (None if settings.keep is None else "pilon")
    if form is None:
        raise BadInput(f"name the form to write with --to: {', '.join(EXPORTERS)}")
    folder = named(output)
    result = write(settings.model, folder, form, settings, overwrite=overwrite).dump()
    print_json(result) if as_json else print_result(result)


def print_result(result: dict[str, Any]) -> None:
    """Print the folder, what the exporter measured, and how the result loads."""
    print(result["output"])
    if "ffn" in result:
        ffn, whole = result["ffn"]["bytes_ratio"], result["model"]["bytes_ratio"]
        say(f"feed-forward bytes {ffn:.4f} of bfloat16 dense, the whole model {whole:.3f}")
    if "max_logit_difference" in result:
        say(f"largest difference of outputs {result['max_logit_difference']:.3g}")
    if "rest_relative_error" in result:
        say(f"outputs moved by {result['rest_relative_error']:.3g} of their norm by rounding the rest")
    print(f"loads with {result['load']}")
