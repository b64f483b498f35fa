"""The end of a run: the final weights are judged, and a model folder is written."""

import copy
import json
import logging
import math
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import pilon_compress
from pilon_compress.config import training as recipes
from pilon_compress.config.training import TrainRecipe
from pilon_compress.data.corpus import Corpus, source_of
from pilon_compress.export.save import MODELING_FILE, drop_bundled, save_model
from pilon_compress.io import companions, manifest
from pilon_compress.io.disk import DiskFull, disk_full, replace, sync, sync_tree
from pilon_compress.models import checkpoint
from pilon_compress.models.companions import companions_of
from pilon_compress.models.provenance import lineage
from pilon_compress.nn.fold import prune_unused
from pilon_compress.nn.install import install
from pilon_compress.nn.installed import layout_of, projections
from pilon_compress.nn.sharded import full
from pilon_compress.nn.usage import shared_primitives
from pilon_compress.optimize.loop import validation_loss
from pilon_compress.optimize.monitor import read_metrics
from pilon_compress.optimize.training import Training, put
from pilon_compress.report.card import training_card
from pilon_compress.report.training_page import write_pages
from pilon_compress.results.training import TrainedExits, TrainResult
from pilon_compress.tiers.modules import Tiered
from pilon_compress.train.exits.add import add_exits
from pilon_compress.train.preflight import sized
from pilon_compress.train.promotion import Promotion
from pilon_compress.train.run import RESULT, Run

log = logging.getLogger(__name__)


def finish(run: Run, job: Training, tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> TrainResult | None:
    """Judge the final weights and write the model folder; the figures, on the first process."""
    if job.best_weights:
        put(job.trainee, job.best_weights)
    for _, layer in projections(job.trainee.model):
        layer.settle()
    round_to(job.trainee, dtype_of(run.recipe))
    if job.routing is not None:
        job.routing()  # from here on the validation text alone counts
    loss = math.nan if run.recipe.task == "gates" else validation_loss(job)
    routing = None if job.routing is None else job.routing()
    model = gathered(job)
    result: TrainResult | None = None
    if run.world.first:
        prune_unused(model)
        exits = gates_added(run, job, model, corpus) if run.recipe.gated else None
        loss = loss if exits is None else math.log(exits.perplexity_without * (1 + exits.perplexity_increase))
        if corpus.ends and model.generation_config is not None:  # an answer ends where the chats' answers did
            model.generation_config.eos_token_id = list(corpus.ends)
        told: dict[str, Any] = {"begins_with": corpus.begins_with}
        told |= {} if routing is None else {"routing": routing}
        if job.extra_fields is not None and run.asked.task == "heal":  # otherwise nobody has named a teacher
            told |= job.extra_fields(loss, job.before)
        told |= {} if exits is None else {"exits": exits}
        for promotion in (one for one in job.callbacks if isinstance(one, Promotion)):
            told["tiers"] = promotion.told
        result = describe(run, job, model, loss).model_copy(update=told)
        if run.stages:
            result = summed(result, run.stages)
        write(run, model, tokenizer, result)
    run.world.wait()
    return result


def gates_added(run: Run, job: Training, model: PreTrainedModel, corpus: Corpus) -> TrainedExits:
    """Add exit gates to the final `model`, on the CPU, in place; their figures. They are all that task gates does."""
    if not run.quiet:
        log.info("exit gates: prices of skipping, then a threshold on the validation text")
    work = run.output / "checkpoints" / "exits"
    model.to(run.world.device)
    found = add_exits(model, corpus, run.recipe.exits, dtype_of(run.recipe), work, run.recipe.seed)
    model.to("cpu")
    if run.recipe.task == "gates":
        job.tokens, job.seconds = found.tokens, found.seconds
    return found


def summed(result: TrainResult, stages: Sequence[TrainResult]) -> TrainResult:
    """The result with the figures of all `stages`, itself the last one, and with what they come to together."""
    every = [*stages, result]
    told = ("before", "val_perplexity", "val_cosine", "steps", "tokens", "seconds")
    sums = {name: sum(getattr(one, name) for one in every) for name in ("steps", "tokens", "seconds")}
    return result.model_copy(update=sums | {"stages": [one.stage(told) for one in every]})


@torch.no_grad()
def round_to(module: nn.Module, dtype: torch.dtype) -> None:
    """Give weights the values that they are saved with, so that those are what is judged."""
    if dtype != torch.float32:
        resting = [table for part in module.modules() if isinstance(part, Tiered) for table in part.tables.values()]
        for weight in (*module.parameters(), *(table.values for table in resting)):
            weight.copy_(weight.to(dtype))


def gathered(job: Training) -> PreTrainedModel:
    """The model on the CPU, whole: on every process, since sharded tensors are gathered by all."""
    model: Any = job.trainee.model
    state = {name: full(tensor).detach().cpu().clone() for name, tensor in model.state_dict().items()}
    state = plain_state(model, state)
    plain = copy.copy(model.config)
    fresh = checkpoint.build(plain)
    computed = dict(fresh.named_buffers())  # of positions and the like, which no state holds
    fresh = fresh.to("meta")
    layout = layout_of(model)
    if layout.replaced:
        install(fresh, layout)
    fresh.load_state_dict(state, assign=True)
    fresh.tie_weights()
    for name, buffer in list(fresh.named_buffers()):
        if buffer.is_meta:
            place, _, leaf = name.rpartition(".")
            setattr(fresh.get_submodule(place), leaf, computed[name])
    if hasattr(model, "generation_config"):  # not without a head
        fresh.generation_config = model.generation_config
    return fresh.eval()


def plain_state(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state`, the whole state of a settled model, with every projection's as that of a plain one."""
    names = {id(module): name for name, module in model.named_modules()}
    for _, layer in projections(model):
        state = layer.settled(state, names[id(layer)] + ".")
    return state


def describe(run: Run, job: Training, model: PreTrainedModel, loss: float) -> TrainResult:
    """The figures of the run, for the mean `loss` on the validation text."""
    layout = layout_of(model)
    dense = checkpoint.empty_model(model.config)
    sizes = sized(layout, dense)
    if layout.replaced:
        sizes["ffn"] = sizes["ffn"].model_copy(update={"shared_primitives": shared_primitives(model)})
    measured: dict[str, Any] = {
        job.metric.name: job.metric.of(loss),
        f"best_{job.metric.name}": job.metric.of(min(job.best, loss)),
    }
    return TrainResult(
        format_version=1,
        pilon_compress=pilon_compress.__version__,
        task=run.asked.task,
        data=source_of(run.recipe),
        **measured,
        steps=job.step,
        tokens=job.tokens,
        seconds=job.seconds,
        tokens_per_second=job.tokens / max(job.seconds, 1e-9),
        parameters=sum(p.numel() for p in model.parameters()),
        **sizes,
        processes=run.world.size,
        device=str(run.world.device),
        command=run.command,
        recipe=recipes.dump(run.asked),
        output=str(run.output),
    )


def dtype_of(recipe: TrainRecipe) -> torch.dtype:
    """Return the dtype of the saved weights; float32 for ternary ones, since rounding would flip weights."""
    named = checkpoint.find_dtype(recipe.dtype)
    if named is not None or recipe.ternary.enabled:
        return named or torch.float32
    start = checkpoint.load_config(recipe.start).dtype if recipe.start is not None else None
    return start if isinstance(start, torch.dtype) else torch.float32


def write(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, result: TrainResult) -> None:
    """Put the model into the output folder: all files are made aside first, config.json moves in last.

    Raises DiskFull; the last checkpoint stands.
    """
    try:
        _write(run, model, tokenizer, result)
    except Exception as error:
        if reason := disk_full(error):
            words = f"cannot write {run.output}: {reason}; the training is done, --resume writes the model"
            raise DiskFull(words, reason) from error
        raise
    if not run.quiet:
        log.info("model %s", run.output)


def _write(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, result: TrainResult) -> None:
    work = run.output / "checkpoints" / "model"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    start = run.recipe.start
    model.config.use_cache = True
    drop_bundled(model.config)
    save_model(model, tokenizer, work, dtype_of(run.recipe))
    if start is not None:
        beside = companions_of(start)
        beside.pop(MODELING_FILE, None)
        companions.copy(beside, work)
    (work / RESULT).write_text(json.dumps(result.dump(), indent=2))
    write_pages(result.dump(), run.asked, read_metrics(run.output), work)
    dense = None if start is None else lineage(checkpoint.resolve(start)).dense
    card = training_card(result.dump(), run.asked, model.can_generate(), dense)
    (work / "README.md").write_text(card, encoding="utf-8")
    manifest.write(work)
    sync_tree(work)
    for path in sorted(work.iterdir(), key=lambda path: path.name == "config.json"):
        if path.name == "config.json":
            sync(run.output)
        if path.is_dir():
            shutil.rmtree(run.output / path.name, ignore_errors=True)
        replace(path, run.output / path.name)
    work.rmdir()
