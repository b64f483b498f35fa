"""The road from a training recipe to a model folder.

    output folder -> tokenizer -> corpus -> model -> trainee -> loop (with checkpoints) -> finish -> save -> report

OUT holds the run while it goes on (recipe.yaml, metrics.jsonl, checkpoints/, tokenizer) and the model when it is done.
"""

import copy
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import pilon_compress
from pilon_compress import checkpoint, text
from pilon_compress.convert.stream import blocks
from pilon_compress.deploy.save import check_output, copy_companions, save_model
from pilon_compress.errors import BadInput
from pilon_compress.families import find_sites
from pilon_compress.form.fold import prune_unused
from pilon_compress.form.layout import install, layout_of
from pilon_compress.measure import encoder, sample
from pilon_compress.measure.size import ffn_size, linear_macs
from pilon_compress.train import hosts
from pilon_compress.train import recipe as recipes
from pilon_compress.train.batch import Batch
from pilon_compress.train.card import model_card
from pilon_compress.train.corpus import Corpus, open_corpus, open_paragraphs, source_of
from pilon_compress.train.distributed import World, full, join, lone, wrap
from pilon_compress.train.heal import Healing, open_healing, steps_of
from pilon_compress.train.health import Health
from pilon_compress.train.loop import PERPLEXITY, Training, put, restore, train, validation_loss, weights_in
from pilon_compress.train.losses import NextToken
from pilon_compress.train.monitor import Monitor, read_metrics
from pilon_compress.train.optim import make_optimizers, restrict
from pilon_compress.train.order import in_order
from pilon_compress.train.plan import check, plan, sized
from pilon_compress.train.plugins import plugins_for
from pilon_compress.train.recipe import TrainRecipe
from pilon_compress.train.report import write_pages
from pilon_compress.train.selection import stage
from pilon_compress.train.shrink import shrink
from pilon_compress.train.staged_linear import finalise, settled_state
from pilon_compress.train.state import Checkpoints

__all__ = ["plan", "train_model"]

RECIPE, TOKENIZER = "recipe.yaml", "tokenizer"
SAMPLE = 32  # tokens of text at every evaluation


@dataclass
class Run:
    """What the steps below hand on."""

    recipe: TrainRecipe
    output: Path
    world: World
    command: str
    quiet: bool


def train_model(
    recipe: TrainRecipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: str = "",
    quiet: bool = False,
) -> dict[str, Any]:
    """Train the model that `recipe` describes and write it to `output`, a folder that `from_pretrained` takes.

    With `resume` a run that was stopped goes on from its last checkpoint, to the same weights as if it had not been
    (bit for bit on a CPU); one that has none begins. Returns the contents of train.json: val_perplexity, tokens,
    tokens_per_second, ffn, output, ... Raises BadInput, and `loop.Stopped` after a signal.
    """
    check(recipe)
    if recipe.shrink:
        return shrink_model(Run(recipe, Path(output), lone(), command, quiet), resume, overwrite)
    with join(recipe.device) as world:
        run = Run(recipe, Path(output), world, command, quiet)
        fresh = claim(run, resume, overwrite)
        try:
            job, tokenizer, corpus = set_up(run, resume)
            told = Monitor(run.output, job.steps, job.step, list(recipe.run.track), quiet) if world.first else _Silent()
        except BadInput:
            if fresh and world.first:
                shutil.rmtree(run.output, ignore_errors=True)
            raise
        with told as monitor:
            train(job, monitor)  # type: ignore[arg-type]
        return finish(run, job, tokenizer, corpus)


def shrink_model(run: Run, resume: bool, overwrite: bool) -> dict[str, Any]:
    """Convert and heal in turn, see `shrink.shrink`."""
    claim(run, resume, overwrite)

    def heal(stage: TrainRecipe, folder: Path) -> dict[str, Any]:
        return train_model(stage, folder, resume=True, command=run.command, quiet=run.quiet)

    return shrink(run.recipe, run.output, heal, command=run.command, quiet=run.quiet)


def set_up(run: Run, resume: bool) -> tuple[Training, PreTrainedTokenizerBase, Corpus]:
    """Everything up to the first step, or up to where the last checkpoint was."""
    recipe, world = run.recipe, run.world
    torch.manual_seed(recipe.seed)
    tokenizer = open_tokenizer(run)
    mine = -(-recipe.run.batch_size // world.size)
    micro_batches = -(-mine // min(mine, recipe.run.micro_batch_size or mine))
    corpus = open_text(run, tokenizer, micro_batches)
    model = open_model(run, tokenizer)
    healing = open_healing(recipe, world, model, corpus, run.quiet) if recipe.task == "heal" else None
    job = assemble(run, model, healing.corpus if healing else corpus, micro_batches, healing)
    prompt = recipe.run.sample
    if prompt is not None and world.size == 1 and model.can_generate():
        job.sample = lambda: prompt + sample.continued(model, tokenizer, prompt, SAMPLE)
    if resume and job.checkpoints.steps():
        restore(job, job.checkpoints.steps()[-1])
    return job, tokenizer, corpus


class _Silent(nullcontext["_Silent"]):
    """The monitor of every process but the first."""

    def __enter__(self) -> "_Silent":
        return self

    def log(self, *_: Any) -> None: ...
    def show(self, *_: Any) -> None: ...
    def say(self, *_: Any) -> None: ...


def claim(run: Run, resume: bool, overwrite: bool) -> bool:
    """Make the output folder ours, with the recipe in it; or find the run that it holds, if that is to go on.

    Whether it is a new one.
    """
    output, mark = run.output, run.output / RECIPE
    begun = resume and mark.is_file()
    if begun:
        before = recipes.load(str(mark))
        if difference := changed(before, run.recipe):
            raise BadInput(f"{output} was begun with another {difference}: resume with the same recipe, or start anew")
    elif not resume or (output.exists() and any(output.iterdir())):
        check_output(output, overwrite, run.recipe.start or "")
    run.world.wait()
    if begun or not run.world.first:
        run.world.wait()
        return not begun
    if output.exists() and overwrite:
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    mark.write_text(recipes.dump(run.recipe))
    run.world.wait()
    return True


def changed(before: TrainRecipe, now: TrainRecipe) -> str | None:
    """The first field in which two recipes differ; how the work is done may differ, as long as batches are the same."""
    free = {"batch_size", "train"}
    for name, old in before.model_dump(mode="json").items():
        new = now.model_dump(mode="json")[name]
        if name == "device" or old == new:
            continue
        if not isinstance(old, dict):
            return name
        keys = [key for key in old if old[key] != new[key] and not (name == "run" and key not in free)]
        if keys:
            return f"{name}.{keys[0]} ({old[keys[0]]}, now {new[keys[0]]})"
    return None


def open_tokenizer(run: Run) -> PreTrainedTokenizerBase:
    """The tokenizer of the model to start from, of the recipe, or one trained on the text; kept in the output."""
    recipe, folder = run.recipe, run.output / "checkpoints" / TOKENIZER
    if recipe.start is not None:
        tokenizer = checkpoint.load_tokenizer(recipe.start)
        if recipe.data.chat_template is not None:
            tokenizer.chat_template = read_template(recipe.data.chat_template)
        return tokenizer
    if recipe.ffn.like is not None:
        return checkpoint.load_tokenizer(recipe.ffn.like)
    if recipe.host.tokenizer != "bpe":
        return checkpoint.load_tokenizer(recipe.host.tokenizer)
    if run.world.first and not folder.is_dir():
        documents = list(text.open_text(source_of(recipe), "calibration"))
        tokenizer = hosts.train_tokenizer(documents, recipe.host.vocab_size)
        tokenizer.save_pretrained(folder.with_suffix(".part"))
        folder.with_suffix(".part").rename(folder)
    run.world.wait()
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return found


def open_text(run: Run, tokenizer: PreTrainedTokenizerBase, micro_batches: int) -> Corpus:
    """The text: one stretch of tokens, or separate paragraphs for an encoder that is healed."""
    recipe, world = run.recipe, run.world
    if recipe.start is not None and not checkpoint.is_causal(config := checkpoint.load_config(recipe.start)):
        longest = encoder.positions(checkpoint.empty_model(config))
        return open_paragraphs(recipe, tokenizer, micro_batches, longest)
    return open_corpus(recipe, tokenizer, micro_batches, world.rank, world.size)


def read_template(file: str) -> str:
    """A chat template. Raises BadInput where there is none."""
    try:
        return Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the chat template {file} cannot be read: {error}") from None


def open_model(run: Run, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model to train, in float32, with what does not learn frozen."""
    recipe = run.recipe
    if recipe.start is not None:
        model = checkpoint.load_model(recipe.start, dtype=torch.float32)
    elif recipe.ffn.like is not None:
        config = checkpoint.load_config(recipe.ffn.like)
        layout = hosts.layout_in(config)
        if layout is not None:
            layout = hosts.with_ternary(layout, find_sites(checkpoint.empty_model(config)), recipe.ternary)
        model = hosts.build_with(config, layout, recipe.seed)
    else:
        config = hosts.config_for(recipe.host, recipe.data.sequence_length, tokenizer.eos_token_id)
        if len(tokenizer) > config.vocab_size:
            raise BadInput(f"the tokenizer has {len(tokenizer)} tokens, host.vocab_size is {config.vocab_size}")
        model = hosts.build(config, recipe.ffn, recipe.seed, recipe.ternary)
    stage(model, recipe)
    model.config.use_cache = False
    restrict(model, recipe.run.train)
    if recipe.run.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(run.world.device).train()


def assemble(
    run: Run, model: PreTrainedModel, corpus: Corpus, micro_batches: int, healing: Healing | None = None
) -> Training:
    """Trainee, wrappers, optimisers and schedules."""
    recipe, world = run.recipe, run.world
    half = recipe.run.autocast == "bfloat16" or (recipe.run.autocast == "auto" and world.device.type == "cuda")
    trainee: nn.Module = healing.trainee if healing else NextToken(model)
    layers = list(blocks(model).values())
    wrapped = wrap(trainee, layers, world, recipe.run.parallel, half)
    compiled: Callable[..., Any] = torch.compile(wrapped, dynamic=False) if recipe.run.compile else wrapped
    health = Health(model)
    optimizers, steps = make_optimizers(trainee, recipe.optimizer), steps_of(recipe, corpus)
    return Training(
        recipe=recipe,
        world=world,
        trainee=trainee,
        run=compiled,
        wrapped=wrapped,
        optimizers=optimizers,
        batches=corpus.batches,
        steps=steps,
        validate=lambda: healing.judge(wrapped) if healing else judge(wrapped, corpus, run),
        checkpoints=Checkpoints(run.output, world, recipe.run.keep),
        prepare=healing.prepared if healing else prepared,
        plugins=[*([healing] if healing else []), *plugins_for(recipe, model, optimizers, steps), health],
        figure=healing.figure if healing else PERPLEXITY,
        told=healing.told if healing else None,
        keep_best=healing is not None and recipe.distill.keep_best,
        health=health,
        micro_batches=micro_batches,
        flops_per_token=6.0 * macs_per_token(model),
        half=half,
    )


def prepared(batch: Batch) -> tuple[Any, ...]:
    """What the trainee is called with."""
    return batch.inputs(), batch.labels


def judge(wrapped: nn.Module, corpus: Corpus, run: Run) -> tuple[float, int]:
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
    return linear_macs(model) + (ffn_size(layout).macs if layout.projections else 0)


def finish(run: Run, job: Training, tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> dict[str, Any]:
    """Judge the final weights, write the model folder, and say what came of it."""
    if job.kept:
        put(job.trainee, job.kept)  # moving averages included: they are what was judged
        job.ema = {}
    with weights_in(job):
        finalise(job.trainee.model)
        round_to(job.trainee, dtype_of(run.recipe))
        loss = validation_loss(job)
        model = gathered(job)
    result: dict[str, Any] = {}
    if run.world.first:
        prune_unused(model)
        if corpus.ends and model.generation_config is not None:  # an answer ends where the chats' answers did
            model.generation_config.eos_token_id = list(corpus.ends)
        result = describe(run, job, model, loss)
        if job.told is not None:
            result |= job.told(loss, job.before)
        write(run, model, tokenizer, result)
    run.world.wait()
    return result


@torch.no_grad()
def round_to(module: nn.Module, dtype: torch.dtype) -> None:
    """Give weights the values that they are saved with, so that those are what is judged."""
    if dtype != torch.float32:
        for parameter in module.parameters():
            parameter.copy_(parameter.to(dtype))


def gathered(job: Training) -> PreTrainedModel:
    """The model on the CPU, whole: on every process, since sharded tensors are gathered by all."""
    model: Any = job.trainee.model
    state = {name: full(tensor).detach().cpu().clone() for name, tensor in model.state_dict().items()}
    state = settled_state(model, state)
    plain = copy.copy(model.config)
    fresh = checkpoint.build(plain).to("meta")
    layout = layout_of(model)
    if layout.projections or layout.kept:
        install(fresh, layout)
    fresh.load_state_dict(state, assign=True)
    fresh.tie_weights()
    if hasattr(model, "generation_config"):  # not without a head
        fresh.generation_config = model.generation_config
    return fresh.eval()


def describe(run: Run, job: Training, model: PreTrainedModel, loss: float) -> dict[str, Any]:
    """The contents of train.json, for the mean `loss` on the validation text."""
    layout = layout_of(model)
    dense = checkpoint.empty_model(model.config)
    return {
        "format_version": 1,
        "pilon_compress": pilon_compress.__version__,
        "task": run.recipe.task,
        "data": source_of(run.recipe),
        job.figure.name: job.figure.of(loss),
        f"best_{job.figure.name}": job.figure.of(min(job.best, loss)),
        "steps": job.step,
        "tokens": job.tokens,
        "seconds": job.seconds,
        "tokens_per_second": job.tokens / max(job.seconds, 1e-9),
        "parameters": sum(p.numel() for p in model.parameters()),
        **sized(layout, dense),
        "processes": run.world.size,
        "device": str(run.world.device),
        "command": run.command,
        "recipe": recipes.dump(run.recipe),
        "output": str(run.output),
    }


def dtype_of(recipe: TrainRecipe) -> torch.dtype:
    """Of the saved weights."""
    if recipe.dtype != "auto":
        named: torch.dtype = getattr(torch, recipe.dtype)
        return named
    start = checkpoint.load_config(recipe.start).dtype if recipe.start is not None else None
    return start if isinstance(start, torch.dtype) else torch.float32


def write(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, result: dict[str, Any]) -> None:
    """Put the model into the output folder: all files are made aside first, config.json moves in last."""
    work = run.output / "checkpoints" / "model"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    start = run.recipe.start
    model.config.use_cache = True
    save_model(model, tokenizer, work, dtype_of(run.recipe))
    if start is not None:
        copy_companions(checkpoint.resolve(start), work)
    (work / "train.json").write_text(json.dumps(result, indent=2))
    write_pages(result, run.recipe, read_metrics(run.output), work)
    (work / "README.md").write_text(model_card(result, run.recipe, model.can_generate()), encoding="utf-8")
    for path in sorted(work.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():
            shutil.rmtree(run.output / path.name, ignore_errors=True)
        path.replace(run.output / path.name)
    work.rmdir()
    if not run.quiet:
        print(f"model {run.output}", file=sys.stderr)
