"""Experts of a converted model that is healed: they begin as clusters of calibration tokens.

router    rows are the centroids of the block's inputs (k-means of directions, without the mean direction), at a
          temperature at which its scores have ENTROPY of the largest entropy
experts   down's composition is refitted on each cluster: least squares of its k · r numbers against the dense block's
          output, with a ridge towards the static one; the other projections are copies

A block whose routed experts do not lower the error on tokens that no fit has seen keeps copies of its static recipe:
its output is then what it was.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilon_compress.config.experts import ExpertsConfig
from pilon_compress.config.training import TrainRecipe
from pilon_compress.convert.calibrate.damping import damped_solve
from pilon_compress.data.batch import Batch
from pilon_compress.data.corpus import Corpus
from pilon_compress.errors import BadInput
from pilon_compress.models import checkpoint
from pilon_compress.models.expert_layouts import expert_blocks, router_spec
from pilon_compress.models.families import Site, find_sites
from pilon_compress.models.hooks import Before, hooked
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.experts import add_experts
from pilon_compress.nn.installed import layout_of
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.neuron_linear import NeuronLinear
from pilon_compress.nn.router import Router
from pilon_compress.nn.specs import RouterSpec
from pilon_compress.nn.targets import target_of
from pilon_compress.parallel import World, spread
from pilon_compress.train.heal import teacher_of

log = logging.getLogger(__name__)

ENTROPY = 0.5  # of the largest entropy: scores of a router at its start
RIDGE = 1e-2  # of the mean diagonal, towards the static composition
TOKENS = 8192  # of the first batch, at most
HELD_OUT = 4  # one token in so many judges the fit


def routers_to_add(layout: Layout, sites: Sequence[Site], asked: ExpertsConfig) -> dict[str, RouterSpec]:
    """Return a router for every block whose projections all compose from banks, or all use neurons, in floats.

    Raises BadInput where there is none, or where a block is no module of its own.
    """
    if layout.routers:
        raise BadInput("the model has experts already: leave --moe out")
    if layout.exits:
        raise BadInput("the model has exit gates, which come after experts: leave --moe out")
    if layout.quantized:
        raise BadInput("the model is quantised or ternary: experts are for floats, leave --moe out")
    found = {}
    own = [site for site in sites if site.name in layout.replaced and target_of(site.name) == "ffn"]
    for name, block in expert_blocks(own).items() if own else ():
        specs = [layout.projections.get(site.name) or layout.neurons.get(site.name) for site in block]
        if all(spec is not None and getattr(spec, "composition", "") != "softmax" for spec in specs):
            width = layout.shape(next(site.name for site in block if site.role != "down"))[0]
            found[name] = router_spec(width, asked)
    if not found:
        raise BadInput("no block of the model composes all of its projections, which experts need: leave --moe out")
    return found


def with_experts(layout: Layout, routers: Mapping[str, RouterSpec]) -> Layout:
    """Return the layout of a model whose blocks get these routers."""

    def experts(name: str) -> int:
        return next((spec.recipes for block, spec in routers.items() if name.startswith(f"{block}.")), 1)

    return replace(
        layout,
        projections={name: replace(spec, experts=experts(name)) for name, spec in layout.projections.items()},
        neurons={name: replace(spec, experts=experts(name)) for name, spec in layout.neurons.items()},
        routers=dict(routers),
    )


def start_experts(recipe: TrainRecipe, world: World, model: PreTrainedModel, corpus: Corpus) -> None:
    """Give the blocks of a converted model experts, in place, fitted on the first of the text; alike everywhere."""
    assert recipe.ffn.moe is not None
    model.config.use_cache = False
    layout = layout_of(model)
    sites = find_sites(checkpoint.empty_model(model.config), layout.replaced)
    routers = routers_to_add(layout, sites, recipe.ffn.moe)
    dense = checkpoint.load_model(teacher_of(recipe), dtype=torch.float32, share=True)
    batch = corpus.first().to(world.device)
    begin_experts(model.to(world.device), dense.to(world.device), routers, batch, recipe.seed)
    spread(model, world)


@torch.no_grad()
def begin_experts(
    model: PreTrainedModel, dense: PreTrainedModel, routers: Mapping[str, RouterSpec], batch: Batch, seed: int
) -> int:
    """Give the blocks of `model` experts, in place, fitted on a batch; return how many blocks keep static copies.

    dense: the model that it was converted from; its blocks, at the inputs that ours get, are what experts are fitted to
    """
    static = 0
    for name, rows in block_inputs(model, list(routers), batch).items():
        block, target = model.base_model.get_submodule(name), dense.base_model.get_submodule(name)
        wanted: Tensor = target(rows[None])[0]
        fitted = _begin(model, name, routers[name], (rows, *_static(block, rows), wanted), seed)
        static += not fitted
    log.info("experts of %d blocks begin as clusters, of %d as copies", len(routers) - static, static)
    return static


def block_inputs(model: PreTrainedModel, names: Sequence[str], batch: Batch) -> dict[str, Tensor]:
    """Return the inputs (tokens, d) of the modules `names` on a batch, by name; padding does not count."""
    found: dict[str, Tensor] = {}
    inputs = batch.inputs()
    mask = inputs.get("attention_mask")

    def keep(name: str) -> Before:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0][mask.bool()] if mask is not None and mask.dim() == 2 else args[0].flatten(0, -2)
            found[name] = rows[:TOKENS].float()

        return hook

    with hooked(model.base_model, before=[(name, keep(name)) for name in names]):
        model.base_model(**inputs)
    return {name: found[name] for name in names}


def _down(block: nn.Module) -> str:
    """Return the path of the projection of a block that is computed last."""
    return [path for path, layer in block.named_modules() if isinstance(layer, ComposedLinear | NeuronLinear)][-1]


def _static(block: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs (N, k) of a block's last projection, and the block's outputs (N, d), before it has experts."""
    hidden: list[Tensor] = []
    with hooked(block, before=[(_down(block), lambda _, args: hidden.append(args[0].flatten(0, -2)))]):
        output: Tensor = block(rows[None])[0]
    return hidden[0], output


def _begin(
    model: PreTrainedModel, name: str, spec: RouterSpec, seen: tuple[Tensor, Tensor, Tensor, Tensor], seed: int
) -> bool:
    """Add experts to one block and fit them; False where it keeps copies.

    seen: its inputs (N, d), the inputs (N, k) of its last projection, its outputs and the dense block's (N, d)
    """
    rows, hidden, output, wanted = seen
    add_experts(model, {name: spec})
    block: Any = model.base_model.get_submodule(name)
    if len(rows) < 2 * HELD_OUT * spec.experts:
        return False
    held = torch.arange(len(rows), device=rows.device) % HELD_OUT == 0
    start(block.router, rows[~held], seed)
    chosen, weights = block.router.choose(block.router.logits(rows[~held]).softmax(-1))
    down = block.get_submodule(_down(block))
    before = down.weight.clone()
    for expert in range(spec.experts):
        share = (weights * (chosen == expert)).sum(1)
        refit(down, expert, hidden[~held], wanted[~held], share)
    if float((block(rows[held]) - wanted[held]).square().sum()) < float((output - wanted)[held].square().sum()):
        return True
    down.weight.copy_(before)
    return False


def refit(down: Any, expert: int, hidden: Tensor, wanted: Tensor, share: Tensor) -> None:
    """Refit one expert's weights of a block's last projection, in place: least squares over tokens.

    hidden: its inputs (N, k)   wanted: the block's outputs (N, d)   share: weight (N,) of each token
    """
    weight, bias = down.weight[expert], None if down.bias is None else down.bias
    if isinstance(down, ComposedLinear):
        A, B = down.bank.primitives(down.selected.expand(down.experts, -1)[expert])
        latent, B = hidden @ A.permute(1, 0, 2).flatten(1), B.flatten(0, 1)
        group = len(B) // weight.numel()  # components that share a coefficient
    else:
        chosen = None if down.selection is None else down.selection(expert if down.selection.experts > 1 else 0)
        latent, B, group = hidden, down.bank.part("down", chosen), 1
        bias = None if bias is None else bias[expert]
        if not down.scaled:
            return
    latent, B = latent.double(), B.double()
    weighted = latent * share.double()[:, None]
    aim = wanted.double() if bias is None else wanted.double() - bias.double()
    H = (latent.T @ weighted) * (B @ B.T)
    right = ((weighted.T @ aim) * B).sum(1)
    count = weight.numel()
    H = H.view(count, group, count, group).sum((1, 3))
    right = right.view(count, group).sum(1)
    was = weight.double().flatten()
    ridge = RIDGE * H.diagonal().mean().clamp_min(1e-30)
    H.diagonal().add_(ridge)
    weight.copy_(damped_solve(H, (right + ridge * was)[:, None])[:, 0].view_as(weight))


def start(router: Router, rows: Tensor, seed: int) -> None:
    """Set the weights of a linear router from clusters of `rows` (N, d); those of an MLP stay small and random."""
    if router.kind != "linear":
        generator = torch.Generator().manual_seed(seed)
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
        return
    from sklearn.cluster import KMeans  # here: it takes a second, which other trainings need not wait for

    mean = torch.nn.functional.normalize(rows.mean(0), dim=0)
    across = rows - (rows @ mean)[:, None] * mean
    unit = torch.nn.functional.normalize(across, dim=1)
    found = KMeans(router.experts, n_init=2, random_state=seed).fit(unit.cpu().numpy())
    centres = torch.from_numpy(found.cluster_centers_).to(rows)
    centres = torch.nn.functional.normalize(centres - (centres @ mean)[:, None] * mean, dim=1)
    logits = rows @ centres.T
    low, high = 1e-3 / float(logits.std()), 1e3 / float(logits.std())
    most = torch.tensor(float(router.experts)).log()
    for _ in range(40):
        middle = (low * high) ** 0.5
        entropy = torch.special.entr((middle * logits).softmax(1)).sum(1).mean() / most
        low, high = (middle, high) if entropy > ENTROPY else (low, middle)
    router.weight.copy_(low * centres)
