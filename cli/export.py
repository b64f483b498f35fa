"""`pilon-compress export`: a PILON model in a form that other tools load."""

from typing import Annotated

import typer

from pilon_compress.config.export import ExportConfig
from pilon_compress.errors import BadInput
from pilon_compress.results.export import ExportResult

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
    from pilon_compress.convert.refit import refit_on_text
    from pilon_compress.export.registry import EXPORTERS
    from pilon_compress.export.run import export as write
    from pilon_compress.export.run import targets

    if list_targets:
        found = targets(settings.model, settings)
        if as_json:
            print_json({"model": settings.model, "targets": [vars(one) for one in found]})
            return
        rows = [[one.target, one.about, f"no: it {one.reason}" if one.reason else "yes"] for one in found]
        print_table(settings.model, ["target", "what it writes", "takes this model"], rows)
        return
    form = settings.to or (None if settings.keep is None else "pilon")
    if form is None:
        raise BadInput(f"name the form to write with --to: {', '.join(sorted(EXPORTERS))}")
    folder = named(output)
    result = write(settings.model, folder, form, settings, overwrite=overwrite, refit=refit_on_text)
    print_json(result.dump()) if as_json else print_result(result)


def print_result(result: ExportResult) -> None:
    """Print the folder, what the exporter measured, and how the result loads."""
    figures = result.figures
    print(result.output)
    if figures.ffn is not None and figures.model is not None:
        from pilon_compress.report.formatting import replaced_of

        name, sizes = replaced_of(figures.dump())
        ratio, whole = sizes["bytes_ratio"], figures.model.bytes_ratio
        say(f"{name} bytes {ratio:.4f} of bfloat16 dense, the whole model {whole:.3f}")
    if figures.max_logit_difference is not None:
        say(f"largest difference of outputs {figures.max_logit_difference:.3g}")
    if figures.rest_relative_error is not None:
        say(f"outputs moved by {figures.rest_relative_error:.3g} of their norm by rounding the rest")
    for remark in figures.remarks:
        say(remark)
    print(f"loads with {result.load}")
