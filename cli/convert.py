"""`pilon-compress convert`: a dense checkpoint in, a PILON model folder with its report out."""

import json
import shlex
import sys
from typing import Annotated, Any

import typer

from pilon_compress.errors import BadInput

from .output import print_json, print_table, say, wait_passively
from .part_table import print_parts

MODEL = "Hub id, local folder, or package:NAME of an installed package that ships a checkpoint."
PANELS = {"budget": "Budget", "data": "Calibration and evaluation", "scope": "What is replaced", "run": "Running"}


def convert(
    model: Annotated[str | None, typer.Argument(help=MODEL + " Not needed with a recipe that names one.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder to write; must be new or empty.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Bundled recipe name (see `recipes list`) or a YAML file.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a recipe field: a.b=value.")] = None,
    ffn_ratio: Annotated[
        str | None,
        typer.Option(
            help="Stored FFN parameters over dense, e.g. 0.5; or a preset: minimal .9, baseline .75, mild .6, "
            "moderate .5, aggressive .25, extreme .1.",
            rich_help_panel=PANELS["budget"],
        ),
    ] = None,
    bands: Annotated[
        str | None,
        typer.Option(
            help="Number of bands, or layers per band: '[[0,1,2],[3,4,5]]'.", rich_help_panel=PANELS["budget"]
        ),
    ] = None,
    n_primitives: Annotated[
        int | None, typer.Option(help="Primitives per bank.", rich_help_panel=PANELS["budget"])
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of each primitive.", rich_help_panel=PANELS["budget"])] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Primitives that each layer selects.", rich_help_panel=PANELS["budget"])
    ] = None,
    allow_larger: Annotated[
        bool,
        typer.Option(
            "--allow-larger", help="Permit plans larger than dense, for study.", rich_help_panel=PANELS["budget"]
        ),
    ] = False,
    method: Annotated[str | None, typer.Option(help="pilon, or a baseline: whitened-svd, svd.")] = None,
    composition: Annotated[str | None, typer.Option(help="component or scalar.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text source: hub:REPO:CONFIG:SPLIT:COLUMN, a txt / jsonl / parquet file or glob, stdlib, stdin.",
            rich_help_panel=PANELS["data"],
        ),
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
            help="Text to evaluate on; default: the held-out part of the calibration source; 'none' skips it.",
            rich_help_panel=PANELS["data"],
        ),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(help="Replace only these modules: name, class or re:REGEX.", rich_help_panel=PANELS["scope"]),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Leave these modules dense.", rich_help_panel=PANELS["scope"])
    ] = None,
    optimize: Annotated[
        str | None,
        typer.Option(
            help="storage, or compute: MACs over dense at most the FFN ratio.", rich_help_panel=PANELS["budget"]
        ),
    ] = None,
    mac_ratio: Annotated[
        str | None, typer.Option(help="Limit on FFN MACs over dense.", rich_help_panel=PANELS["budget"])
    ] = None,
    effort: Annotated[str | None, typer.Option(help="fast, balanced or best.", rich_help_panel=PANELS["run"])] = None,
    refine: Annotated[
        int | None,
        typer.Option(
            help="Steps of regression to the dense model after the closed form; default 0.",
            rich_help_panel=PANELS["run"],
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the saved weights: auto, float32, bfloat16, float16.", rich_help_panel=PANELS["run"]),
    ] = None,
    bank_dtype: Annotated[
        str | None,
        typer.Option(
            help="Of banks and matrices: int8, int4, int3, int2; auto as everything else.",
            rich_help_panel=PANELS["budget"],
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda.", rich_help_panel=PANELS["run"])] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling and fit.", rich_help_panel=PANELS["run"])] = None,
    max_memory: Annotated[
        float | None,
        typer.Option(
            help="GiB that the conversion may use; larger models are read block by block. Default: what is free.",
            rich_help_panel=PANELS["run"],
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output.", rich_help_panel=PANELS["run"])
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the plan, found by calibration, and stop.",
            rich_help_panel=PANELS["run"],
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="List every layer in tables.", rich_help_panel=PANELS["run"])
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.", rich_help_panel=PANELS["run"])
    ] = False,
) -> None:
    """Convert a dense model to PILON: plan, calibrate, fit, save, load back, evaluate, report.

    pilon-compress convert gpt2 -o out/gpt2-half --ffn-ratio 0.5
    """
    options: dict[str, Any] = {
        "model": model,
        "method": method,
        "seed": seed,
        "dtype": dtype,
        "device": device,
        "budget.bands": None if bands is None else _yaml(bands),
        "budget.n_primitives": n_primitives,
        "budget.rank": rank,
        "budget.top_k": top_k,
        "budget.allow_larger": allow_larger or None,
        "budget.optimize": optimize,
        "budget.mac_ratio": mac_ratio,
        "effort": effort,
        "max_memory": max_memory,
        "refine.steps": refine,
        "form.composition": composition,
        "form.bank_dtype": bank_dtype,
        "calibration.data": calibration,
        "calibration.samples": samples,
        "calibration.sequence_length": sequence_length,
        "calibration.batch_size": batch_size,
        "evaluation.data": eval_data,
        "scope.targets": targets,
        "scope.ignore": ignore,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    settings = _read(recipe, [*_ratio(ffn_ratio), *overrides, *(set_ or [])])
    if not dry_run and output is None:
        raise BadInput("name the folder to write with -o")
    wait_passively()

    from pilon_compress.convert.cost import estimate
    from pilon_compress.convert.prepare import prepare
    from pilon_compress.io.folders import check_output, open_output

    if not dry_run:
        assert output is not None
        with open_output(output, overwrite, settings.model) as path:
            _run(settings, path, overwrite, as_json, verbose)
        return
    if output is not None:
        check_output(output, overwrite, settings.model)
    job = prepare(settings)
    expected = estimate(job)

    from pilon_compress.convert.pipeline import settle
    from pilon_compress.io.malloc import give_back_freed

    give_back_freed(scarce=settings.max_memory is not None)
    job = settle(job)
    result = {"dry_run": True, "final": job.final, **job.describe(), "estimate": expected}
    print_json(result) if as_json else print_plan(result, verbose)


def _run(settings: Any, output: Any, overwrite: bool, as_json: bool, verbose: bool) -> None:
    """Plan and convert into `output`, a path which this process holds."""
    from pilon_compress.convert.cost import estimate
    from pilon_compress.convert.prepare import prepare

    job = prepare(settings)
    if not as_json:
        print_estimate(job.plan.ratio, job.final, estimate(job))

    from pilon_compress.convert.pipeline import convert as run
    from pilon_compress.io.malloc import give_back_freed

    give_back_freed(scarce=settings.max_memory is not None)
    report = run(
        settings,
        output,
        overwrite=overwrite,
        command=shlex.join(["pilon-compress", *sys.argv[1:]]),
        job=job,
        on_plan=None if as_json else lambda planned: print_plan(planned.describe(), verbose),
    )
    print_json(report) if as_json else print_result(report)


def print_estimate(ratio: float, final: bool, expected: dict[str, float]) -> None:
    """Print the budget and the cost of the conversion on this machine, before anything is read."""
    from pilon_compress.report.formatting import number

    sizes = "the plan follows" if final else "sizes per layer follow after calibration"
    say(
        f"FFN to at most {number(ratio)} of its dense parameters; {sizes}; "
        f"about {number(expected['seconds'])} s and {number(expected['peak_gib'])} GiB here\n"
    )


def print_plan(result: dict[str, Any], verbose: bool = False) -> None:
    """The plan that will be made; sizes alone where it is not final."""
    from pilon_compress.report.formatting import mib, number

    final = result.get("final", True)
    if final:
        print_parts("Plan", result["plan"]["banks"], result["dtype"], verbose=verbose)
    ffn, whole, expected = result["ffn"], result["model"], result.get("estimate")
    about = "" if final else "about "
    text = (
        f"FFN {about}{number(ffn['stored_ratio'])} of the dense parameters, {number(ffn['mac_ratio'])} of its MACs; "
        f"whole model {about}{number(whole['stored_ratio'])}, {mib(whole['bytes'])}: "
        f"{number(whole['bytes_ratio_to_source'])} of the dense file ({result['source_dtype']})"
    )
    if result["source_dtype"] != "bfloat16":
        text += f", {number(whole['bytes_ratio_to_bf16'])} of the dense model in bfloat16"
    if expected:
        text += f"; about {number(expected['seconds'])} s and {number(expected['peak_gib'])} GiB here"
    for line in (*result["notes"], f"{text}\n"):
        say(line)


def print_result(report: dict[str, Any]) -> None:
    """The measured sizes, errors and quality, and where the model is."""
    from pilon_compress.report.formatting import method_name, number, quality, ratios

    rows = [[ratio.label, ratio.part, number(ratio.value), ratio.detail] for ratio in ratios(report)]
    print_table("Size, PILON ÷ dense", ["", "part", "ratio", "measured"], rows)
    rows = [[method_name(method), number(loss)] for method, loss in report["whitened_loss"].items()]
    print_table("Relative squared output error at equal stored size", ["method", "loss"], rows)
    if report["evaluation"]:
        rows = [[figure.label, figure.value, figure.dense] for figure in quality(report["evaluation"])]
        print_table(f"Quality on {report['evaluation']['data']}", ["", "PILON", "dense"], rows)
    else:
        say(f"not evaluated: {report['evaluation_skipped']}\n")
    output = report["output"]
    say(f"{number(report['seconds'])} s, {number(report['peak_rss_gib'])} GiB at the peak")
    print(f"model  {output}\nreport {output}/report.html")


def _ratio(value: str | None) -> list[str]:
    if value is None:
        return []
    from pilon_compress.config.conversion import PRESETS

    word = value.isalpha() and value.lower() not in ("nan", "inf", "infinity")
    key, other = ("preset", "ffn_ratio") if value in PRESETS or word else ("ffn_ratio", "preset")
    return [f"budget.{key}={json.dumps(value)}", f"budget.{other}=null"]


def _yaml(value: str) -> Any:
    from pilon_compress.config import strict_yaml

    try:
        return strict_yaml.parse(value, "--bands").data
    except BadInput:
        raise BadInput(f"--bands {value!r} is neither a number nor a list of lists") from None


def _read(name: str | None, overrides: list[str]) -> Any:
    from pilon_compress.config import conversion

    if name is not None:
        return conversion.load(name, overrides)
    if not any(item.startswith("model=") for item in overrides):
        raise BadInput("name a model to convert, or a --recipe that does")
    return conversion.build({}, overrides)
