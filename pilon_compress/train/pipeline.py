"""The road from a training recipe to a model folder.

    output folder -> tokenizer -> corpus -> model -> trainee -> loop (with checkpoints) -> finish -> save -> report

OUT holds the run while it goes on (recipe.yaml, metrics.jsonl, checkpoints/, tokenizer) and the model when it is done.
"""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pilon_compress.config.experts import ExpertsConfig
from pilon_compress.config.training import TrainRecipe
from pilon_compress.config.training_sections import ExitGates
from pilon_compress.data.batch import Batch
from pilon_compress.data.corpus import Corpus, open_corpus, open_paragraphs
from pilon_compress.data.loader import in_order
from pilon_compress.data.sequences import check_ids
from pilon_compress.distill.losses import NextToken
from pilon_compress.distill.teacher import open_teacher
from pilon_compress.errors import BadInput
from pilon_compress.evaluate import generate
from pilon_compress.io.output_paths import expanded
from pilon_compress.models import base_architectures, checkpoint
from pilon_compress.models.blocks import blocks
from pilon_compress.models.companions import companions_of
from pilon_compress.models.families import find_sites
from pilon_compress.models.limits import longest_input
from pilon_compress.models.task import vocabulary
from pilon_compress.nn.installed import layout_of, projections
from pilon_compress.nn.size import linear_macs, model_size
from pilon_compress.optimize import schedule
from pilon_compress.optimize.callbacks import Callback, extensions
from pilon_compress.optimize.checkpoints import Checkpoints
from pilon_compress.optimize.loop import train, validation_loss
from pilon_compress.optimize.monitor import Monitor
from pilon_compress.optimize.optimizers import make_optimizers, restrict
from pilon_compress.optimize.training import PERPLEXITY, Training, restore
from pilon_compress.parallel import join, lone, spread, wrap
from pilon_compress.results.training import TrainResult
from pilon_compress.train.bank_diagnostics import BankDiagnostics
from pilon_compress.train.dense_warmup import convert_once, stages
from pilon_compress.train.expert_start import start_experts
from pilon_compress.train.finish import finish
from pilon_compress.train.freeze_unused import FreezeUnused
from pilon_compress.train.heal import Healing, open_healing, steps_of, teacher_of, tokens_of
from pilon_compress.train.preflight import check, layout_asked, plan, say_idle
from pilon_compress.train.progressive import shrink
from pilon_compress.train.promotion import Promotion, begin_tiers
from pilon_compress.train.routing import RouterLosses, RoutingFigures
from pilon_compress.train.run import RESULT, STAGES, Run, claim, drop, held, read_result, settle
from pilon_compress.train.ternary.blocks import fit_blocks
from pilon_compress.train.ternary.initialise import ternarise
from pilon_compress.train.ternary.schedule import Rounding, centre, in_stages
from pilon_compress.train.tokenizer import open_tokenizer

log = logging.getLogger(__name__)

__all__ = ["plan", "train_model"]

FITTED, RESTING = "blocks", "tiers"  # folders beside checkpoints, of a run that is not done
SAMPLE = 32  # tokens of text at every evaluation


def train_model(
    recipe: TrainRecipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: str = "",
    quiet: bool = False,
) -> TrainResult | None:
    """Train the model that `recipe` describes and write it to `output`, a folder that `from_pretrained` takes.

    With `resume` a run that was stopped goes on from its last checkpoint, to the same weights as if it had not been
    (bit for bit on a CPU); one that has none begins. Returns the contents of train.json: val_perplexity, tokens,
    tokens_per_second, ffn, output, ... Raises BadInput, and `loop.Stopped` after a signal.
    """
    check(recipe)
    output = expanded(output)
    if recipe.shrink:
        run = Run(recipe, output, lone(), command, quiet)
        with held(run):
            return shrink_model(run, resume, overwrite)
    if recipe.warm:
        lone()
    with join(recipe.device) as world, held(run := Run(recipe, output, world, command, quiet)):
        fresh = claim(run, resume, overwrite)
        if world.first:
            say_idle(recipe)
        if recipe.warm:
            run, fresh = after_dense(run, fresh), False
        if run.recipe.task == "heal" and run.recipe.ternary.enabled:
            run, fresh = after_stages(run, fresh)
        return train_run(run, resume, fresh)


def train_run(run: Run, resume: bool, fresh: bool) -> TrainResult | None:
    """Run one training in a claimed folder; with `fresh`, restore the old folder if the run cannot start."""
    track: list[str] = list(run.recipe.run.track)
    try:
        job, tokenizer, corpus = set_up(run, resume)
        monitors = Monitor(run.output, job.steps, job.step, track, run.quiet) if run.world.first else _NullMonitor()
    except BadInput:
        drop(run, fresh)
        raise
    settle(run)
    with monitors as monitor:
        if run.recipe.task == "heal" and run.recipe.ternary.blocks:
            train_blocks(run, job)
        elif run.recipe.task != "gates":  # whose work is the end, see `finish`
            train(job, monitor)
    result = finish(run, job, tokenizer, corpus)
    for folder in (FITTED, RESTING):  # the model holds what is in them
        shutil.rmtree(run.output / "checkpoints" / folder, ignore_errors=True)
    return result


def after_dense(run: Run, fresh: bool) -> Run:
    """Train dense and convert, in folders inside the output, unless that is done; the run that is left to do."""
    folder = run.output / STAGES
    first, second = stages(run.recipe, folder)
    told = before(run, first, folder / "dense", fresh)
    convert_once(run.recipe, folder)
    if not run.quiet:
        log.info("dense so far, perplexity %.4g; converted, and on", told.val_perplexity)
    return replace(run, recipe=second, whole=run.asked, stages=(told,))


def after_stages(run: Run, fresh: bool) -> tuple[Run, bool]:
    """Heal to ternary weights in all stages but the last, in folders inside the output, unless that is done.

    Returns the run that is left to do, and whether it is `fresh`.
    """
    folder = run.output / STAGES
    try:
        tokens = tokens_of(run.recipe, open_text(run, open_tokenizer(run), 1)) if run.recipe.ternary.staged else 1
    except BadInput:
        drop(run, fresh)
        raise
    *first, (_, last) = in_stages(run.recipe, tokens, folder) if run.recipe.ternary.staged else [("", run.recipe)]
    told: list[TrainResult] = [before(run, recipe, folder / name, fresh=False) for name, recipe in first]
    if not told:
        return replace(run, recipe=last, whole=run.asked), fresh
    return replace(run, recipe=last, whole=run.asked, stages=(*run.stages, *told)), False


def train_blocks(run: Run, job: Training) -> None:
    """Fit the blocks of a ternary model to the teacher's states, on the text of the job's steps."""
    lone()
    started = time.perf_counter()
    model: Any = job.trainee.get_submodule("model")
    job.before = validation_loss(job)
    teacher = open_teacher(teacher_of(run.recipe), model, run.world.device, False)
    batches = [job.batches.batch(step, micro) for step in range(job.steps) for micro in range(job.micro_batches)]
    fit_blocks(model, teacher.model, batches, run.recipe, run.output / "checkpoints" / FITTED, run.quiet, job.half)
    job.step, job.tokens = job.steps, sum(batch.tokens for batch in batches)
    job.seconds = time.perf_counter() - started


def before(run: Run, recipe: TrainRecipe, folder: Path, fresh: bool) -> TrainResult:
    """Return the result of a stage that ends in `folder`, trained now unless it is done."""
    if not (folder / RESULT).is_file():
        recipe = recipe.model_copy(update={"exits": ExitGates()})  # gates belong to the end
        one = replace(run, recipe=recipe, output=folder, whole=None, stages=())
        try:
            train_run(one, True, claim(one, resume=True, overwrite=False))
        except BadInput:
            drop(run, fresh)
            raise
    return read_result(folder)


def shrink_model(run: Run, resume: bool, overwrite: bool) -> TrainResult:
    """Convert and heal in turn, see `shrink.shrink`."""
    claim(run, resume, overwrite)

    def heal(stage: TrainRecipe, folder: Path) -> TrainResult:
        healed = train_model(stage, folder, resume=True, command=run.command, quiet=run.quiet)
        assert healed is not None  # this process is alone
        return healed

    return shrink(run.recipe, run.output, heal, command=run.command, quiet=run.quiet)


def set_up(run: Run, resume: bool) -> tuple[Training, PreTrainedTokenizerBase, Corpus]:
    """Everything up to the first step, or up to where the last checkpoint was."""
    recipe, world = run.recipe, run.world
    torch.manual_seed(recipe.seed)
    if recipe.start is not None and world.first:
        companions_of(recipe.start, quiet=True)  # what cannot be copied is refused now
    tokenizer = open_tokenizer(run)
    mine = -(-recipe.run.batch_size // world.size)
    micro_batches = -(-mine // min(mine, recipe.run.micro_batch_size or mine))
    corpus = open_text(run, tokenizer, micro_batches)
    model = open_model(run, tokenizer, corpus)
    check_ids(tokenizer, corpus.largest, vocabulary(model.config))
    healing = open_healing(recipe, world, model, corpus, run.quiet) if recipe.task == "heal" else None
    job = assemble(run, model, healing.corpus if healing else corpus, micro_batches, healing)
    prompt = recipe.run.sample
    if prompt is not None and world.size == 1 and model.can_generate():
        job.sample = lambda: prompt + generate.continued(model, tokenizer, prompt, SAMPLE)
    if resume and job.checkpoints is not None and job.checkpoints.steps():
        restore(job, job.checkpoints.steps()[-1])
    return job, tokenizer, corpus


class _NullMonitor(nullcontext["_NullMonitor"]):
    """The monitor of every process but the first."""

    def __enter__(self) -> "_NullMonitor":
        return self

    def log(self, *_: Any) -> None: ...
    def show(self, *_: Any) -> None: ...
    def say(self, *_: Any) -> None: ...


def open_text(run: Run, tokenizer: PreTrainedTokenizerBase, micro_batches: int) -> Corpus:
    """The text: one stretch of tokens, or separate paragraphs for an encoder that is healed."""
    recipe, world = run.recipe, run.world
    if recipe.start is not None and not checkpoint.is_causal(config := checkpoint.load_config(recipe.start)):
        longest = longest_input(checkpoint.empty_model(config))
        return open_paragraphs(recipe, tokenizer, micro_batches, longest)
    return open_corpus(recipe, tokenizer, micro_batches, world.rank, world.size)


def open_model(run: Run, tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> PreTrainedModel:
    """The model to train, in float32, with what does not learn frozen."""
    recipe = run.recipe
    if recipe.start is not None:
        model = checkpoint.load_model(recipe.start, dtype=torch.float32)
        if recipe.ffn.moe is not None:
            start_experts(recipe, run.world, model, corpus)
        if layout_of(model).is_ternary:
            if recipe.run.train != "compositions":
                centre(model)
        elif recipe.ternary.enabled:
            round_model(run, model, corpus)
    elif recipe.ffn.like is not None:
        config = checkpoint.load_config(recipe.ffn.like)
        model = base_architectures.build_with(config, layout_asked(recipe, config), recipe.seed)
    else:
        config = base_architectures.config_for(recipe.host, recipe.data.sequence_length, tokenizer.eos_token_id)
        if len(tokenizer) > config.vocab_size:
            raise BadInput(f"the tokenizer has {len(tokenizer)} tokens, host.vocab_size is {config.vocab_size}")
        model = base_architectures.build_with(config, layout_asked(recipe, config), recipe.seed)
    for extension in extensions(recipe):
        extension.stage(model)
    model.config.use_cache = False
    restrict(model, recipe.run.train)
    if recipe.run.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(run.world.device).train()


def round_model(run: Run, model: PreTrainedModel, corpus: Corpus) -> None:
    """Make the model ternary, in place, with the first of the text to go by; alike on all processes."""
    model.config.use_cache = False
    model.to(run.world.device)
    batch, asked = corpus.first().to(run.world.device), run.recipe.ternary
    down = [site.name for site in find_sites(checkpoint.empty_model(model.config)) if site.role == "down"]
    ternarise(model, down, batch.inputs(), group=asked.group)
    spread(model, run.world)


def assemble(
    run: Run, model: PreTrainedModel, corpus: Corpus, micro_batches: int, healing: Healing | None = None
) -> Training:
    """Trainee, wrappers, optimisers and schedules."""
    recipe, world = run.recipe, run.world
    half = recipe.run.autocast == "bfloat16" or (recipe.run.autocast == "auto" and world.device.type == "cuda")
    trainee: nn.Module = healing.recovery.student if healing else NextToken(model)
    resting = run.output / "checkpoints" / RESTING
    if recipe.run.tier is not None:
        if world.size > 1:
            raise BadInput(f"tiers are for one process, and there are {world.size}: leave --tier out")
        begin_tiers(model, recipe.run.tier.n_hot, resting)
    layers = list(blocks(model).values())
    wrapped = wrap(trainee, layers, world, recipe.run.parallel, half)
    compiled: Callable[..., Any] = torch.compile(wrapped, dynamic=False) if recipe.run.compile else wrapped
    diagnostics, routing = BankDiagnostics(model), RoutingFigures(model, world)
    optimizers = make_optimizers(trainee, recipe.optimizer)
    steps = 0 if recipe.task == "gates" else steps_of(recipe, corpus)
    return Training(
        recipe=recipe.model_dump(mode="json"),
        how=recipe.run,
        rate=lambda share: schedule.rate(recipe.schedule, share),
        clip=recipe.optimizer.clip,
        world=world,
        trainee=trainee,
        run=compiled,
        wrapped=wrapped,
        optimizers=optimizers,
        batches=corpus.batches,
        steps=steps,
        validate=lambda: healing.validate(wrapped) if healing else validate(wrapped, corpus, run),
        checkpoints=Checkpoints(run.output, world, recipe.run.keep),
        prepare=healing.recovery.prepared if healing else prepared,
        callbacks=[
            *([healing.recovery] if healing else []),
            *callbacks_for(recipe, model, optimizers, steps),
            *([] if recipe.run.tier is None else [Promotion(model, optimizers, recipe.run.tier, resting)]),
            *([RouterLosses(model, recipe.ffn.moe or ExpertsConfig(), world)] if routing.loads else []),
            diagnostics,
        ],
        metric=healing.metric if healing else PERPLEXITY,
        extra_fields=healing.extra_fields if healing else None,
        evaluate_first=healing is not None,
        keep_best=healing is not None and recipe.distill.keep_best,
        diagnostics=lambda: diagnostics() | routing(),
        routing=routing.report,
        micro_batches=micro_batches,
        flops_per_token=6.0 * macs_per_token(model),
        half=half,
    )


def callbacks_for(
    recipe: TrainRecipe, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer], steps: int
) -> list[Callback]:
    """Callbacks that the recipe asks for, in the order in which they act before each step.

    Raises BadInput for schedules that do not fit the model.
    """
    found = [one for each in extensions(recipe) for one in each.callbacks(model, optimizers, steps)]
    if rounding := Rounding.of(model, recipe, optimizers):
        found.append(rounding)
    if any(layer.moves for _, layer in projections(model)):
        found.append(FreezeUnused(model))
    return found


def prepared(batch: Batch) -> tuple[Any, ...]:
    """Return the arguments of the trainee for a batch."""
    return batch.inputs(), batch.labels


def validate(wrapped: nn.Module, corpus: Corpus, run: Run) -> tuple[float, int]:
    """(nats, tokens) of this process's share of the validation slice."""
    nats, tokens = 0.0, 0
    size = run.recipe.run.micro_batch_size or run.recipe.run.batch_size
    for batch in in_order(corpus.validation, size, run.world.rank, run.world.size):
        nats += float(wrapped(*prepared(batch.to(run.world.device))))
        tokens += batch.scored
    return nats, tokens


def macs_per_token(model: PreTrainedModel) -> float:
    """Multiply-accumulates of all products with weights."""
    layout = layout_of(model)
    return model_size(layout, checkpoint.empty_model(model.config)).macs if layout.replaced else linear_macs(model)
