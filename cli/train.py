"""`pilon-compress train`: from scratch, healing by distillation, fine-tuning on chats."""

import json
import shlex
import sys
from typing import Annotated, Any

import typer

from pilon_compress.errors import BadInput

from .output import print_json, print_table

PANELS = {"what": "What is trained", "data": "Text", "run": "Running"}


def train(
    recipe: Annotated[str | None, typer.Option(help="Bundled recipe name (see `recipes list`) or a YAML file.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder to write; must be new or empty.")] = None,
    heal: Annotated[
        str | None,
        typer.Option(help="A converted model, to learn from its dense teacher.", rich_help_panel=PANELS["what"]),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The dense model to follow; default: the one that was converted.", rich_help_panel=PANELS["what"]
        ),
    ] = None,
    cache_teacher: Annotated[
        int | None,
        typer.Option(
            help="Keep so many of the teacher's largest logits for each token on disk: it runs once.",
            rich_help_panel=PANELS["what"],
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="At which the teacher is followed.", rich_help_panel=PANELS["what"])
    ] = None,
    shrink: Annotated[
        str | None,
        typer.Option(
            help="With --heal DENSE: convert to these ratios in turn, as 0.6,0.4,0.2, and heal after each.",
            rich_help_panel=PANELS["what"],
        ),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            help="From scratch, as a control: the layout, host and tokenizer of this converted model, random weights.",
            rich_help_panel=PANELS["what"],
        ),
    ] = None,
    sft: Annotated[
        str | None, typer.Option(help="A model, dense or PILON, to teach chats.", rich_help_panel=PANELS["what"])
    ] = None,
    ffn: Annotated[
        str | None,
        typer.Option(
            help="From scratch: pilon, lowrank (the control: factors of each layer's own) or dense (the baseline).",
            rich_help_panel=PANELS["what"],
        ),
    ] = None,
    ternary: Annotated[
        bool,
        typer.Option(
            "--ternary",
            help="Weights of the feed-forward part as digits -1, 0, 1; with --heal after factors have healed.",
            rich_help_panel=PANELS["what"],
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text source: hub:REPO:CONFIG:SPLIT:COLUMN, a txt / jsonl / parquet file or glob, stdlib.",
            rich_help_panel=PANELS["data"],
        ),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(help="Text to judge by; default: the held-out part of --data.", rich_help_panel=PANELS["data"]),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="Jinja file, for a tokenizer without a template (sft).", rich_help_panel=PANELS["data"]),
    ] = None,
    learn: Annotated[
        str | None, typer.Option(help="all, ffn, or compositions alone.", rich_help_panel=PANELS["what"])
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens per sequence.", rich_help_panel=PANELS["data"])
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to train on; default: the recipe's, or one pass over the text.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Sequences per step, all processes together.", rich_help_panel=PANELS["run"]),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="At the top of the schedule.", rich_help_panel=PANELS["run"])
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a recipe field: a.b=value.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda.", rich_help_panel=PANELS["run"])] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and order.", rich_help_panel=PANELS["run"])] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the last checkpoint in the output.", rich_help_panel=PANELS["run"]),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output.", rich_help_panel=PANELS["run"])
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Stop after the plan.", rich_help_panel=PANELS["run"])
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.", rich_help_panel=PANELS["run"])
    ] = False,
) -> None:
    """Train: a PILON model from scratch, a converted one after its teacher, or any on chats.

    pilon-compress train --recipe smoke -o out/smoke

    On several GPUs: torchrun --nproc_per_node 8 -m pilon_compress.cli train ... Stopped with Ctrl-C, it goes on with
    --resume.
    """
    if heal is not None and sft is not None:
        raise BadInput("--heal and --sft are different trainings: do one after the other")
    options: dict[str, Any] = {
        "start": heal or sft,
        "teacher": teacher,
        "distill.cache_teacher": cache_teacher,
        "distill.temperature": temperature,
        "shrink": shrink,
        "ffn.like": like,
        "ffn.kind": ffn,
        "ternary.enabled": ternary or None,
        "data.source": data,
        "data.validation": validation,
        "data.chat_template": chat_template,
        "data.sequence_length": sequence_length,
        "run.train": learn,
        "schedule.tokens": tokens,
        "run.batch_size": batch_size,
        "optimizer.learning_rate": learning_rate,
        "device": device,
        "seed": seed,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    task = "heal" if heal is not None else "sft" if sft is not None else "pretrain" if like is not None else None
    settings = _read(recipe, task, [*overrides, *(set_ or [])])
    if output is None and not dry_run:
        raise BadInput("name the folder to write with -o")

    from pilon_compress.train import pipeline
    from pilon_compress.train.loop import Stopped

    if dry_run:
        planned = pipeline.plan(settings)
        print_json(planned) if as_json else print_plan(planned)
        return
    assert output is not None
    command = shlex.join(["pilon-compress", *sys.argv[1:]])
    try:
        result = pipeline.train_model(
            settings, output, resume=resume, overwrite=overwrite, command=command, quiet=as_json
        )
    except Stopped as stopped:
        print(f"stopped, and saved: --resume goes on with {output}", file=sys.stderr)
        raise SystemExit(stopped.code) from None
    if result:  # on the first process
        print_json(result) if as_json else print_result(result)


def print_plan(planned: dict[str, Any]) -> None:
    """What would be trained."""
    from pilon_compress.report.formatting import number, short_count

    rows = [
        ["parameters", short_count(planned["parameters"])],
        ["FFN stored ÷ dense", number(planned["ffn"]["stored_ratio"])],
        ["FFN MACs ÷ dense", number(planned["ffn"]["mac_ratio"])],
        ["tokens", short_count(planned["tokens"]) if planned["tokens"] else "one pass over the text"],
        ["sequences per step", number(planned["batch_size"])],
    ]
    print_table(f"{planned['task']}: {planned['data']}", ["", "planned"], rows)


def print_result(result: dict[str, Any]) -> None:
    """What came of it, and where it is."""
    from pilon_compress.report.formatting import number, short_count

    judged = next(name for name in ("val_perplexity", "val_cosine") if name in result)
    rows = [[judged.replace("val_", "validation "), number(result[judged])]]
    if "before" in result:
        rows += [["before healing", number(result["before"])], ["the teacher's", number(result["teacher"])]]
    rows += [
        ["tokens", short_count(result["tokens"])],
        ["tokens per second", number(round(result["tokens_per_second"]))],
        ["parameters", short_count(result["parameters"])],
        ["FFN stored ÷ dense", number(result["ffn"]["stored_ratio"])],
        ["FFN MACs ÷ dense", number(result["ffn"]["mac_ratio"])],
    ]
    print_table(f"{result['task']}, {number(result['seconds'])} s", ["", "measured"], rows)
    print(f"model   {result['output']}\nmetrics {result['output']}/metrics.jsonl")


def _read(name: str | None, task: str | None, overrides: list[str]) -> Any:
    from pilon_compress.config import training

    if name is not None:
        return training.load(name, overrides + ([f"task={task}"] if task else []))
    if task is None:
        raise BadInput("name a --recipe to train from scratch, or a model to --heal or --sft")
    return training.build({"task": task}, overrides)
