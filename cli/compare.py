"""`pilon-compress compare`: PILON against published baselines, at equal stored size, on the same text."""

import json
import shlex
import sys
from typing import Annotated, Any

import typer

from pilon_compress.errors import BadInput

from .convert import MODEL
from .output import print_json, print_table, say, wait_passively

PANELS = {"what": "What is compared", "data": "Calibration and evaluation", "run": "Running"}


def print_methods(asked: bool) -> None:
    """Print the table of all methods and leave, where `--list` is given."""
    if asked:
        from pilon_compress.compare.run import method_table

        print_table("Methods", *method_table())
        raise typer.Exit


def compare(
    model: Annotated[str, typer.Argument(help=MODEL)],
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder to write; must be new or empty.")] = None,
    ffn_ratio: Annotated[
        list[str] | None,
        typer.Option(
            help="Stored FFN parameters over dense; may be given several times. Default: 0.6, 0.4.",
            rich_help_panel=PANELS["what"],
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated names of methods; --list describes all of them. Default: every method that is "
            "compared at equal stored numbers.",
            rich_help_panel=PANELS["what"],
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="Calibration texts to draw and average over.", rich_help_panel=PANELS["what"])
    ] = 3,
    calibration: Annotated[
        str | None, typer.Option(help="Text source, as for convert.", rich_help_panel=PANELS["data"])
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Calibration paragraphs (encoders) or blocks (LMs).", rich_help_panel=PANELS["data"]),
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens per calibration sequence.", rich_help_panel=PANELS["data"])
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences per calibration batch.", rich_help_panel=PANELS["data"])
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            help="Text to judge by; default: the held-out part of the calibration source.",
            rich_help_panel=PANELS["data"],
        ),
    ] = None,
    eval_samples: Annotated[
        int | None,
        typer.Option(
            help="Texts (encoders) or windows (LMs) to judge by; default: 500 / 64.", rich_help_panel=PANELS["data"]
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.", rich_help_panel=PANELS["run"])] = "auto",
    seed: Annotated[int, typer.Option(help="The first seed.", rich_help_panel=PANELS["run"])] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier comparison.", rich_help_panel=PANELS["run"])
    ] = False,
    list_methods: Annotated[
        bool,
        typer.Option(
            "--list",
            callback=print_methods,
            is_eager=True,
            help="Print every method and what it does, and stop.",
            rich_help_panel=PANELS["run"],
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Stop after sizing every method.", rich_help_panel=PANELS["run"])
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.", rich_help_panel=PANELS["run"])
    ] = False,
) -> None:
    """Compare PILON with published methods: quality, stored size and MACs, over several calibration texts.

    pilon-compress compare gpt2 --ffn-ratio 0.6 --ffn-ratio 0.4 -o out/gpt2-compared
    pilon-compress compare gpt2 --ffn-ratio 0.8 --methods pilon,pilon-int3,rtn-int4,gptq-int3 -o out/gpt2-bytes

    An interrupted comparison goes on where it stopped when the same command is given again.
    """
    options: dict[str, Any] = {
        "model": model,
        "seed": seed,
        "calibration.data": calibration,
        "calibration.samples": samples,
        "calibration.sequence_length": sequence_length,
        "calibration.batch_size": batch_size,
        "evaluation.data": eval_data,
        "evaluation.samples": eval_samples,
    }
    wait_passively()

    from pilon_compress.config import conversion

    settings = conversion.build(
        {}, [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    )
    if not dry_run and output is None:
        raise BadInput("name the folder to write with -o")

    from pilon_compress.compare import run as comparing
    from pilon_compress.config.ratio import parse_ratios
    from pilon_compress.io.folders import check_output

    if output is not None:
        check_output(output, overwrite, kind="comparison")
    chosen = [name.strip() for name in methods.split(",")] if methods is not None else comparing.default_methods()
    ratios = [ratio for value in ffn_ratio or ["0.6", "0.4"] for ratio in parse_ratios("--ffn-ratio", value)]
    asked = comparing.plan(settings, ratios, chosen, seeds)
    if dry_run:
        result = {"dry_run": True, **asked.describe()}
        print_json(result) if as_json else print_plan(result)
        return
    assert output is not None
    command = shlex.join(["pilon-compress", *sys.argv[1:]])
    result = comparing.compare(asked, output, overwrite=overwrite, command=command, device=device)
    print_json(result) if as_json else print_result(result)


def print_plan(result: dict[str, Any]) -> None:
    """What each method would store at each ratio."""
    from pilon_compress.report.formatting import number, short_count
    from pilon_compress.report.methods import method_of

    rows = []
    for one in result["planned"]:
        counts = [short_count(one["stored"]), number(one["stored_ratio"]), number(one["bytes_ratio"])]
        rows.append([method_of(one["method"]).title, f"{one['ratio']:g}", *counts])
    headings = ["method", "asked FFN ratio", "stored", "stored ÷ dense", "bytes ÷ dense"]
    print_table(result["source"], headings, rows)
    calibration = result["calibration"]
    say(
        f"{len(result['seeds'])} draws of {number(calibration['samples'])} sequences from {calibration['data']}; "
        f"{number(result['cells'])} models to make and judge"
    )


def print_result(result: dict[str, Any]) -> None:
    """One table per ratio, best first, and where to look."""
    from pilon_compress.report.comparison_page import terminal_table
    from pilon_compress.report.formatting import number

    for ratio in result["ratios"]:
        print_table(f"Stored FFN ratio {ratio:g}", *terminal_table(result, ratio))
    say(f"{number(result['seconds'])} s; {result['output']}/compare.html, compare.md, compare.json")
