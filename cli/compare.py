"""`pilon-compress compare`: PILON against published baselines, at equal stored size, on the same text."""

from typing import Annotated

import typer

from pilon_compress.config.comparison import CompareCommand
from pilon_compress.config.option import RUNNING
from pilon_compress.results.comparison import Comparison, PlannedComparison

from .options import configured
from .output import command_line, print_json, print_table, say, wait_passively
from .parameters import DryRun, Json, Output, Overwrite, named


def print_methods(wanted: bool) -> None:
    """Print the table of all methods and leave, where `--list` is given."""
    if wanted:
        from pilon_compress.compare.run import method_table

        print_table("Methods", *method_table())
        raise typer.Exit


@configured(CompareCommand)
def compare(
    settings: CompareCommand,
    output: Output = None,
    overwrite: Overwrite = False,
    list_methods: Annotated[
        bool,
        typer.Option(
            "--list",
            callback=print_methods,
            is_eager=True,
            help="Print every method and what it does, and stop.",
            rich_help_panel=RUNNING,
        ),
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Compare PILON with published methods: quality, stored size and MACs, over several calibration texts.

    pilon-compress compare gpt2 --ffn-ratio 0.6,0.4 -o out/gpt2-compared
    pilon-compress compare gpt2 --ffn-ratio 0.8 --methods pilon,pilon-int3,rtn-int4,gptq-int3 -o out/gpt2-bytes

    An interrupted comparison goes on where it stopped when the same command is given again.
    """
    folder = None if dry_run else named(output)
    wait_passively()

    from pilon_compress.compare import run as comparing

    if dry_run:
        planned = comparing.dry_run(settings, folder, overwrite=overwrite)
        print_json(planned.dump()) if as_json else print_plan(planned)
        return
    folder = named(output)

    from pilon_compress.compare import run as comparing

    result = comparing.run(settings, folder, overwrite=overwrite, command=command_line())
    print_json(result.dump()) if as_json else print_result(result)


def print_plan(result: PlannedComparison) -> None:
    """Print the numbers and bytes that each method would store at each ratio."""
    from pilon_compress.report.formatting import number, short_count
    from pilon_compress.report.methods import method_of

    rows = []
    for one in result.planned:
        counts = [short_count(one.stored), number(one.stored_ratio), number(one.bytes_ratio)]
        rows.append([method_of(one.method).title, f"{one.ratio:g}", *counts])
    headings = ["method", "requested FFN ratio", "stored", "stored ÷ dense", "bytes ÷ dense"]
    print_table(result.source, headings, rows)
    calibration = result.calibration
    say(
        f"{len(result.seeds)} draws of {number(calibration.samples)} sequences from {calibration.data}; "
        f"{number(result.cells)} models to make and evaluate"
    )


def print_result(result: Comparison) -> None:
    """Print one table per ratio, best method first, and the files that were written."""
    from pilon_compress.report.comparison_page import terminal_table
    from pilon_compress.report.formatting import number

    dumped = result.dump()
    for ratio in result.ratios:
        print_table(f"Stored FFN ratio {ratio:g}", *terminal_table(dumped, ratio))
    say(f"{number(result.seconds)} s; {result.output}/compare.html, compare.md, compare.json")
