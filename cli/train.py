"""`pilon-compress train`: from scratch, healing by distillation, fine-tuning on chats."""

import sys
from typing import Annotated

import typer

from pilon_compress.config.option import RUNNING
from pilon_compress.config.training import TrainRecipe
from pilon_compress.results.training import PlannedTraining, TrainResult

from .options import Recipes, configured
from .output import command_line, print_json, print_table
from .parameters import DryRun, Json, Output, Overwrite, named

Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.", rich_help_panel=RUNNING)
]
NEEDS = "name a --recipe to train from scratch, or a model to --heal, --sft or --exit-gates"


@configured(TrainRecipe, Recipes("convert", NEEDS))
def train(
    settings: TrainRecipe,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train: a PILON model from scratch, a converted one after its teacher, or any on chats.

    pilon-compress train --recipe smoke -o out/smoke

    On several GPUs: torchrun --nproc_per_node 8 -m pilon_compress.cli train ... Stopped with Ctrl-C, it goes on with
    --resume.
    """
    if dry_run:
        from pilon_compress.train.pipeline import plan

        planned = plan(settings)
        print_json(planned.dump()) if as_json else print_plan(planned)
        return
    folder = named(output)

    from pilon_compress.optimize.loop import Stopped
    from pilon_compress.train.pipeline import train_model

    try:
        result = train_model(
            settings, folder, resume=resume, overwrite=overwrite, command=command_line(), quiet=as_json
        )
    except Stopped as stopped:
        print(f"stopped after saving a checkpoint: --resume goes on with {folder}", file=sys.stderr)
        raise SystemExit(stopped.code) from None
    if result:  # on the first process
        print_json(result.dump()) if as_json else print_result(result)


def print_plan(planned: PlannedTraining) -> None:
    """Print the size of the model that would be trained, and the length of its training."""
    from pilon_compress.report.formatting import number, short_count

    rows = [
        ["parameters", short_count(planned.parameters)],
        *_sizes(planned),
        ["tokens", short_count(planned.tokens) if planned.tokens else "one pass over the text"],
        ["sequences per step", number(planned.batch_size)],
    ]
    if planned.tiers is not None:
        rows.append(["primitives that learn at a time", f"{planned.tiers.hot} hot, {planned.tiers.cold} cold"])
    print_table(f"{planned.task}: {planned.data}", ["", "planned"], rows)


def print_result(result: TrainResult) -> None:
    """Print validation figures, speed and sizes, and the files that were written."""
    from pilon_compress.report.formatting import number, short_count

    metrics = {"perplexity": result.val_perplexity, "cosine": result.val_cosine}
    rows = [[f"validation {name}", number(value)] for name, value in metrics.items() if value is not None]
    if result.before is not None and result.teacher is not None:
        rows += [["before healing", number(result.before)], ["teacher", number(result.teacher)]]
    rows += [
        ["tokens", short_count(result.tokens)],
        ["tokens per second", number(round(result.tokens_per_second))],
        ["parameters", short_count(result.parameters)],
        *_sizes(result),
    ]
    if (exits := result.exits) is not None:
        rows += [
            ["FFN work skipped", f"{exits.skipped:.1%}"],
            ["perplexity, nothing skipped", number(exits.perplexity_without)],
            ["perplexity increase", f"{exits.perplexity_increase:.2%} of {exits.max_perplexity_increase:.2%}"],
        ]
    if (tiers := result.tiers) is not None:
        rows.append(["primitives", f"{tiers.hot} hot, {tiers.cold} cold, {tiers.promoted} promoted"])
    print_table(f"{result.task}, {number(result.seconds)} s", ["", "measured"], rows)
    print(f"model   {result.output}\nmetrics {result.output}/metrics.jsonl")


def _sizes(result: PlannedTraining | TrainResult) -> list[list[str]]:
    """Return rows of the stored parameters and MACs of what is replaced, over the dense model's."""
    from pilon_compress.report.formatting import number, replaced_of

    name, sizes = replaced_of(result.dump())
    ratios = [("stored", sizes["stored_ratio"]), ("MACs", sizes["mac_ratio"])]
    return [[f"{name} {what} ÷ dense", number(ratio)] for what, ratio in ratios]
