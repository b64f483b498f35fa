"""Check a recipe against its models, and describe its training, before the run starts."""

import logging
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from pilon_compress.config.conflicts import Context, Table, without_effect
from pilon_compress.config.training import TrainRecipe, idle
from pilon_compress.data.corpus import source_of
from pilon_compress.data.text import DEFAULT_ENCODER
from pilon_compress.errors import BadInput
from pilon_compress.io.messages import note
from pilon_compress.kernels.gpu_layout import MULTIPLE
from pilon_compress.models import base_architectures, checkpoint, layouts
from pilon_compress.models.families import find_sites
from pilon_compress.models.limits import longest_input
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.size import model_size, replaced_size, target_ratios
from pilon_compress.optimize.callbacks import extensions
from pilon_compress.optimize.trackers import check_trackers
from pilon_compress.results.sizes import Ratios
from pilon_compress.results.training import PlannedTraining, Tiers
from pilon_compress.tiers.modules import tiers_of
from pilon_compress.train.exits.places import check_gates, gate_places, with_gates
from pilon_compress.train.expert_start import routers_to_add, with_experts
from pilon_compress.train.heal import teacher_of

log = logging.getLogger(__name__)

_ENCODER = Context[TrainRecipe](lambda _: True, lambda _: "an encoder, which follows embeddings")
_CAUSAL = Context[TrainRecipe](lambda _: True, lambda _: "a causal model, which follows predictions")
ENCODER: Table[TrainRecipe] = {f"distill.{name}": (_ENCODER,) for name in ("kl", "temperature", "next_token")} | {
    "data.respect_documents": (_ENCODER,),
    "run.sample": (_ENCODER,),
}
CAUSAL: Table[TrainRecipe] = {"distill.pooled": (_CAUSAL,)}


def check(recipe: TrainRecipe) -> None:
    """Raise BadInput for a recipe that does not go with the models it names: before anything is written."""
    check_trackers(recipe.run.track)
    if recipe.gated and recipe.ffn.moe is not None:
        raise BadInput("exit gates and experts were not tried together: leave out one of the two")
    model = recipe.start or recipe.ffn.like
    if model is None:
        if recipe.gated:
            check_gates(base_architectures.config_for(recipe.host, recipe.data.sequence_length, None), "the model")
        return
    config = checkpoint.load_config(model)
    if recipe.gated:
        check_gates(config, model)
    if recipe.shrink:
        checkpoint.check_dense(model, config)
    elif recipe.task == "heal":
        teacher_of(recipe)
    layout = base_architectures.layout_in(config)
    if recipe.start is not None and layout is not None and layout.quantized and not layout.is_ternary:
        raise BadInput(f"{model} is packed, which does not train: start from the model that it was made from")
    if recipe.ffn.moe is not None and recipe.start is not None:
        if layout is None:
            raise BadInput(f"{model} is dense: convert it, since experts are recipes over its banks")
        routers_to_add(layout, find_sites(checkpoint.empty_model(config), layout.replaced), recipe.ffn.moe)
    if recipe.gated and layout is not None and layout.routers:
        raise BadInput(f"{model} has experts, with which exit gates were not tried: give a model without them")
    if layout is not None and layout.exits and recipe.task in ("heal", "sft") and not recipe.gated:
        note(f"{model} has exit gates, chosen before this training: they stay, --exit-gates chooses them anew")
    if recipe.ternary.enabled and recipe.start is not None and not recipe.shrink:
        if layout is None:
            raise BadInput(f"{model} is dense: convert it, or name --shrink")
        if layout.routers:
            raise BadInput(f"{model} has experts, which are ternary from scratch alone: leave --ternary out")
        if layout.is_ternary:
            raise BadInput(f"{model} is ternary already: leave --ternary out")
        if layout.neuron_banks:
            raise BadInput(f"{model} has banks of neurons, which are ternary from scratch alone: leave --ternary out")
        note_odd_ranks(layout)
    if not checkpoint.is_causal(config):
        if recipe.task != "heal":
            raise BadInput(f"{model} predicts no next token: an encoder can be healed, not trained otherwise")
        if recipe.distill.cache_teacher:
            raise BadInput("distill.cache_teacher keeps a causal model's predictions: leave it out for an encoder")
        refuse(recipe, ENCODER)
        return
    if recipe.task == "heal":
        refuse(recipe, CAUSAL)
    longest = longest_input(checkpoint.empty_model(config))
    if longest is not None and recipe.data.sequence_length > longest:
        raise BadInput(f"{model} takes {longest} tokens: --sequence-length {longest}, or less")


def note_odd_ranks(layout: Layout) -> None:
    """Say how many projections have ranks that the ternary kernels pad, and what that costs."""
    packed = layout.in_format("ternary-base3")
    odd = [name for name, spec in layout.projections.items() if spec.top_k * layout.banks[spec.bank].rank % MULTIPLE]
    if odd:
        before, after = (replaced_size(one).over_dense().mac_ratio for one in (layout, packed))
        note(
            f"{len(odd)} of {len(layout.projections)} projections have ranks that are no multiples of {MULTIPLE}: the "
            f"ternary kernels pad them, MACs {before:.3f} -> {after:.3f} of the dense ones "
            f"(`convert --rank-multiple {MULTIPLE}` avoids it)"
        )


def refuse(recipe: TrainRecipe, table: Table[TrainRecipe]) -> None:
    """Raise BadInput for the first field of `table` that is set: it has no effect."""
    for field, message in without_effect(recipe, table):
        raise BadInput(f"{field} {message}: leave it out")


def say_idle(recipe: TrainRecipe) -> None:
    """Log a line for every field that is set and that the form of the model has no use for."""
    for sentence in idle(recipe):
        log.info("%s", sentence)


def plan(recipe: TrainRecipe) -> PlannedTraining:
    """Return the planned training of a recipe, from shapes alone. Raises BadInput."""
    check(recipe)
    say_idle(recipe)
    if recipe.start is not None:
        config = checkpoint.load_config(recipe.start)
    elif recipe.ffn.like is not None:
        config = checkpoint.load_config(recipe.ffn.like)
    else:
        config = base_architectures.config_for(recipe.host, recipe.data.sequence_length, None)
    dense = checkpoint.empty_model(config)
    layout = layout_asked(recipe, config)
    if recipe.gated:
        layout = with_gates(layout, gate_places(dense), recipe.exits.substitute)
    sizes = sized(layout, dense)
    parameters = sum(p.numel() for p in dense.parameters())
    if recipe.shrink:  # about: conversions find their layouts themselves
        sizes = {"ffn": Ratios(stored_ratio=recipe.shrink[-1], mac_ratio=recipe.shrink[-1])}
        parameters -= round((1 - recipe.shrink[-1]) * sum(site.parameters for site in find_sites(dense)))
    elif layout is not None:
        parameters = model_size(layout, dense).stored
    separate = recipe.task == "heal" and not checkpoint.is_causal(config)
    return PlannedTraining(
        dry_run=True,
        task=recipe.task,
        data=recipe.data.source or DEFAULT_ENCODER if separate else source_of(recipe),
        tokens=recipe.exits.tokens if recipe.task == "gates" else recipe.schedule.tokens,
        batch_size=recipe.run.batch_size,
        parameters=parameters,
        **sizes,
        tiers=planned_tiers(recipe, layout),
    )


def planned_tiers(recipe: TrainRecipe, layout: Layout | None) -> Tiers | None:
    """Return the tiers that a training of that layout has. Raises BadInput where nothing would be cold."""
    if recipe.run.tier is None:
        return None
    hot, cold = tiers_of(layout or Layout({}, {}), recipe.run.tier.n_hot)
    return Tiers(n_hot=recipe.run.tier.n_hot, hot=hot, cold=cold)


def layout_asked(recipe: TrainRecipe, config: PretrainedConfig) -> Layout | None:
    """The layout that a model of `config` trains in; None of a dense one.

    It is that of the model to start from or to be like, or a new one within the budget, as far as `ternary` and
    research change it.
    """
    sites = find_sites(checkpoint.empty_model(config))
    if recipe.start is None and recipe.ffn.like is None:
        layout = layouts.layout_for(sites, recipe.ffn, recipe.ternary)
    else:
        layout = base_architectures.layout_in(config)
        if layout is not None and recipe.start is not None and recipe.ffn.moe is not None:
            sites = find_sites(checkpoint.empty_model(config), layout.replaced)
            layout = with_experts(layout, routers_to_add(layout, sites, recipe.ffn.moe))
        layout = layout and layouts.with_ternary(layout, sites, recipe.ternary)
    if recipe.start is None:
        for extension in extensions(recipe):
            layout = extension.layout(layout, sites)
    return layout


def sized(layout: Layout | None, dense: PreTrainedModel) -> dict[str, Any]:
    """Sizes over the dense model's: fields `ffn` and, of a PILON model, `model` of a result, and those of
    `target_ratios`."""
    if layout is None or not layout.replaced:
        return {"ffn": Ratios(stored_ratio=1.0, bytes_ratio=1.0, mac_ratio=1.0)}
    return {**target_ratios(layout), "model": model_size(layout, dense).over_dense()}
