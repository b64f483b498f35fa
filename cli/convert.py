"""`pilon-compress convert`: a dense checkpoint in, a PILON model folder with its report out."""

from statistics import mean

from pilon_compress.config.conversion import Recipe
from pilon_compress.results import conversion as results

from .options import Recipes, configured
from .output import command_line, print_json, print_table, say, wait_passively
from .parameters import DryRun, Json, Output, Overwrite, Verbose, named
from .part_table import print_parts


@configured(Recipe, Recipes("train", needs="name a model to convert, or a --recipe that does"))
def convert(
    settings: Recipe,
    output: Output = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Convert a dense model to PILON: plan, calibrate, fit, save, load back, evaluate, report.

    pilon-compress convert gpt2 -o out/gpt2-half --ffn-ratio 0.5
    """
    wait_passively()
    if dry_run:
        from pilon_compress.convert import pipeline

        planned = pipeline.dry_run(settings, output, overwrite=overwrite)
        print_json(planned.dump()) if as_json else print_plan(planned, verbose)
        return
    folder = named(output)

    from pilon_compress.convert import pipeline

    report = pipeline.convert(
        settings,
        folder,
        overwrite=overwrite,
        command=command_line(),
        on_start=None if as_json else lambda job, cost: print_estimate(job.replaced, job.plan.ratio, job.final, cost),
        on_plan=None if as_json else lambda job: print_plan(job.describe(), verbose),
    )
    print_json(report.dump()) if as_json else print_result(report)


def print_estimate(replaced: str, ratio: float, final: bool, expected: results.Estimate) -> None:
    """Print the budget and the cost of the conversion on this machine, before anything is read."""
    from pilon_compress.report.formatting import number

    sizes = "the plan follows" if final else "sizes per layer follow after calibration"
    say(
        f"{replaced} to at most {number(ratio)} of the dense parameters; {sizes}; "
        f"about {number(expected.seconds)} s and {number(expected.peak_gib)} GiB on this machine\n"
    )


def print_plan(result: results.ConversionPlan, verbose: bool = False) -> None:
    """Print the plan with its sizes; the sizes alone while it is not final."""
    from pilon_compress.report.formatting import mib, number, parts_of

    expected = result.estimate if isinstance(result, results.DryRun) else None
    final = not isinstance(result, results.DryRun) or result.final
    if final:
        print_parts("Plan", [part.dump() for part in result.plan.banks], result.dtype, verbose=verbose)
    whole, dumped = result.model, result.dump()
    about = "" if final else "about "
    text = "".join(
        f"{name} {about}{number(dumped[key]['stored_ratio'])} of the dense parameters, "
        f"{number(dumped[key]['mac_ratio'])} of its MACs; "
        for key, name in parts_of(dumped)
        if key != "model"
    ) + (
        f"whole model {about}{number(whole.stored_ratio)}, {mib(whole.bytes)}: "
        f"{number(whole.bytes_ratio_to_source)} of the dense file ({result.source_dtype})"
    )
    if result.source_dtype != "bfloat16":
        text += f", {number(whole.bytes_ratio_to_bf16)} of the dense model in bfloat16"
    if expected:
        text += f"; about {number(expected.seconds)} s and {number(expected.peak_gib)} GiB on this machine"
    for line in (*result.notes, f"{text}\n"):
        say(line)


def print_result(report: results.Report) -> None:
    """Print the measured sizes, errors and quality, and the folder of the model."""
    from pilon_compress.report.formatting import method_name, number, quality, ratios

    rows = [[ratio.label, ratio.part, number(ratio.value), ratio.detail] for ratio in ratios(report.dump())]
    print_table("Size, PILON ÷ dense", ["", "part", "ratio", "measured"], rows)
    rows = [[method_name(method), number(loss)] for method, loss in report.whitened_loss.items()]
    if rows:
        print_table("Relative squared output error at equal stored size", ["method", "loss"], rows)
    if blocks := report.slices:
        lost = mean(block.relative_error for block in blocks)
        busiest = max(max(block.load) * len(block.load) for block in blocks)
        say(
            f"{len(blocks)} blocks in slices: tokens lose {number(lost)} of the squares of a block's output, the "
            f"busiest expert has {number(busiest)} times the mean load\n"
        )
    if report.evaluation is not None:
        rows = [[figure.label, figure.value, figure.dense] for figure in quality(report.evaluation.dump())]
        print_table(f"Quality on {report.evaluation.data}", ["", "PILON", "dense"], rows)
    else:
        say(f"not evaluated: {report.evaluation_skipped}\n")
    if report.sharing is not None and not report.sharing.bands:
        say("no band shares: by the metric's loss none would gain")
    elif report.sharing is not None:
        rows = [
            [
                ", ".join(map(str, trial.layers)),
                "none as small" if trial.private is None else number(trial.private),
                number(trial.shared),
                "shared" if trial.accepted and report.ffn.shared_primitives else "not shared",
            ]
            for trial in report.sharing.bands
        ]
        print_table("Trials of shared banks: the model's loss on held-out text", ["layers", "own", "shared", ""], rows)
    if report.ffn.shared_primitives:
        say(f"{report.ffn.shared_primitives:,} primitives serve two layers or more")
    say(f"{number(report.seconds)} s, {number(report.peak_rss_gib)} GiB at the peak")
    print(f"model  {report.output}\nreport {report.output}/report.html")
