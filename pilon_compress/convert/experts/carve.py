"""Carve the feed-forward blocks of a dense model into experts: activations on the calibration text, slices, weights.

for each block      run the dense block on the text, and keep what its first projection and `down` read
                    slices of its neurons and a router (`clusters`); the bank has the neurons in that order
                    the share of the block's output that tokens lose, and the load of every expert
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilon_compress.convert.build_model import completed, installed
from pilon_compress.convert.experts.clusters import TOKENS, linear_router, slice_neurons
from pilon_compress.convert.plan import NeuronBankPlan
from pilon_compress.convert.prepare import ConversionJob
from pilon_compress.convert.solve.feed_forward import dense_weight
from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.io.progress import track
from pilon_compress.models.families import Site
from pilon_compress.models.hidden_states import Stream
from pilon_compress.models.hooks import hooked
from pilon_compress.models.source import Source
from pilon_compress.nn.installed import layout_of, neuron_banks
from pilon_compress.nn.neuron_linear import NeuronLinear
from pilon_compress.nn.specs import RouterSpec
from pilon_compress.results.conversion import SlicedBlock


class Slices(NamedTuple):
    """Neurons (recipes, k) of a block's slices, and weights (d_in, N) and (N, d_out), biases (d_out,) by role."""

    neurons: Tensor
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]


@torch.no_grad()
def carve_experts(
    source: Source, job: ConversionJob, batches: Sequence[Batch]
) -> tuple[PreTrainedModel, list[SlicedBlock]]:
    """Return the model whose blocks are the slices of the job's plan, and a report of every block.

    Raises BadInput where activations are not finite.
    """
    model = installed(source, job.layout, job.dtype)
    stores = {store.layers[0]: store for store in job.plan.neuron_banks}
    stream, told = Stream(source, batches), list[SlicedBlock]()
    for layer in track(range(len(source.names)), "carving experts"):
        with source.block(layer) as block:
            if layer not in stores:
                stream.advance(block)
                continue
            store, prefix = stores[layer], f"{source.names[layer]}."
            down = next(site for site in store.sites if site.role == "down")
            first = next(site for site in store.sites if site.role != "down")
            inputs, hidden = read_inputs(stream, block, (first, down), prefix)
            linears = {site.role: block.get_submodule(site.name.removeprefix(prefix)) for site in store.sites}
            weights = {role: dense_weight(linear).float() for role, linear in linears.items()}
            biases = {role: linear.get_parameter("bias").float() for role, linear in linears.items() if _biased(linear)}
        name = down.name.rpartition(".")[0]
        spec, norms = job.plan.routers[name], weights["down"].norm(dim=1)
        neurons = slice_neurons(hidden, norms, spec)
        fill_slices(model, store, Slices(neurons, weights, biases), spec)
        router: Any = model.base_model.get_submodule(name).router.to(inputs.device)
        seen = hidden[:, neurons[spec.shared :, 0]]
        if spec.kind == "linear":
            router.weight.copy_(linear_router(inputs, hidden.abs() * norms, neurons[spec.shared :]))
            seen = inputs
        chosen = router.choose(router.scores(router.logits(seen)))[0]
        told.append(describe_block(down, hidden, weights["down"], neurons[spec.shared :], chosen))
    completed(model, source, job.dtype)
    if layout_of(model) != job.layout:
        raise RuntimeError("the model that was built is not the one that was planned")
    return model, told


def _biased(linear: nn.Module) -> bool:
    return getattr(linear, "bias", None) is not None


def read_inputs(stream: Stream, block: nn.Module, sites: Sequence[Site], prefix: str) -> list[Tensor]:
    """Advance the stream through `block`; return the inputs (T, d_in), float32, of the `sites`, without padding.

    Of more than TOKENS tokens some of every batch are taken, evenly. Raises BadInput where they are not finite.
    """
    found: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    masks = [mask.reshape(-1) for mask in stream.block_masks]
    step = -(-sum(int(mask.sum()) for mask in masks) // TOKENS)

    def keep(site: Site, _: nn.Module, args: tuple[Any, ...]) -> None:
        mask, x = masks[len(found[site.name])], args[0]
        if x.numel() != len(mask) * site.d_in:
            raise BadInput(
                f"{site.name} reads other inputs than the tokens' states: keep its block dense with --ignore"
            )
        found[site.name].append(x.detach().reshape(-1, site.d_in)[mask][::step].float())

    with hooked(block, before=[(site.name.removeprefix(prefix), partial(keep, site)) for site in sites]):
        stream.advance(block)
    inputs = [torch.cat(found[site.name]) for site in sites]
    for site, rows in zip(sites, inputs, strict=True):
        if not bool(rows.isfinite().all()):
            raise BadInput(f"the input of {site.name} is NaN or infinite on the calibration text")
    return inputs


def fill_slices(model: PreTrainedModel, store: NeuronBankPlan, slices: Slices, router: RouterSpec) -> None:
    """Copy a block's slices into the model, in place: the bank has the neurons slice after slice.

    The bias of `down` is that of the first shared slice, or in equal parts that of every expert: `top_k` of them are
    added.
    """
    neurons, width = slices.neurons, store.neurons
    order, each = neurons.flatten(), torch.arange(width, device=neurons.device).view_as(neurons)
    matrices = dict[str, Tensor]()
    for role, weight in slices.weights.items():
        if role == "down":
            matrices[role] = weight[order]
        elif role == "gate_up":
            matrices["gate"], matrices["up"] = weight[:, order], weight[:, width + order]
        else:
            matrices[role] = weight[:, order]
    dict(neuron_banks(model))[store.name].fill(matrices)
    for site in store.sites:
        module = model.base_model.get_submodule(site.name)
        assert isinstance(module, NeuronLinear)
        if module.owns and module.selection is not None:
            module.selection.selected.copy_(each)
        if module.bias is None:
            continue
        bias = slices.biases[site.role]
        if site.role == "down":
            module.bias.zero_()
            module.bias[: router.shared and 1] = bias
            if not router.shared:
                module.bias.copy_(bias / router.top_k)
        else:  # of gate_up the gates, then the others, in each slice
            module.bias.copy_(torch.cat([half[neurons] for half in bias.split(width)], 1))


def describe_block(down: Site, hidden: Tensor, weight: Tensor, experts: Tensor, chosen: Tensor) -> SlicedBlock:
    """Report the load of every expert and the relative squared error of the block's output on `hidden` (T, N).

    weight (N, d_out) of `down`   experts (E, k): neurons of each   chosen (T, K): those of every token
    """
    picked = torch.zeros(len(hidden), len(experts), device=hidden.device).scatter_(1, chosen, 1.0)
    lost = torch.zeros_like(hidden)
    for expert, members in enumerate(experts):
        lost[:, members] = 1 - picked[:, expert, None]
    output = (hidden @ weight).square().sum(dtype=torch.float64)
    error = ((hidden * lost) @ weight).square().sum(dtype=torch.float64)
    load = picked.mean(0) / chosen.shape[1]
    return SlicedBlock(
        name=down.name.rpartition(".")[0],
        layer=down.layer,
        load=load.tolist(),
        relative_error=float(error / output) if output else 0.0,
    )
