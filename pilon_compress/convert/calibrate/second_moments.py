"""Gather K-FAC statistics: second moments of projections' inputs and output gradients over the calibration text.

    inputs       μ, C = E[(x - μ)(x - μ)ᵀ]      of every projection's input x
    gradients    G = E[g gᵀ]                    g: gradient of the model's output by the projection's output

C and G together are the Kronecker-factored Fisher metric of a weight (K-FAC; Martens and Grosse, 2015): E tr(Eᵀ C E G)
is the second-order loss of an error E, in one unit for all weights of a model. For causal LMs labels are drawn from
the model's own predictions, which makes it the Fisher information of the next-token distribution, or the KL divergence
to second order; for encoders random directions of the pooled, normalised embedding, hence its squared error.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.functional import cross_entropy, normalize

from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.io.progress import track
from pilon_compress.io.tensor_store import TensorStore
from pilon_compress.models.families import Site
from pilon_compress.models.hidden_states import Stream
from pilon_compress.models.hooks import hooked
from pilon_compress.models.source import Source
from pilon_compress.nn.functional import mean_pooled, rows_at_once

COPIES = 8  # of logits that exist at once, with their gradients
PANEL = 384  # rows of a Gram matrix that are computed at once


def add_gram(square: Tensor, x: Tensor) -> Tensor:
    """`square` (d, d) += xᵀ x, of rows `x` (N, d), in place.

    Only panels from the diagonal on are computed and then mirrored: for wide rows half of the work of a product.
    """
    for start in range(0, len(square), PANEL):
        here, beyond = slice(start, start + PANEL), slice(start + PANEL, None)
        square[here, start:].addmm_(x[:, here].T, x[:, start:])
        square[beyond, here] = square[here, beyond].T
    return square


class Merge(NamedTuple):
    """A batch of rows, prepared for the merge into running moments.

    centred (N, d): its rows less their mean   shift (d,): its mean less the running one
    weight: factor on the product of shifts   share: of the batch in the merged count
    """

    centred: Tensor
    shift: Tensor
    weight: float
    share: float


def merge(count: int, mean: Tensor, x: Tensor) -> Merge:
    """Plan the pairwise update of Chan, Golub and LeVeque (1979) of `count` rows of that `mean` by rows `x` (N, d).

    Every batch is centred on its own mean first, so float32 is accurate even where the mean is large against the
    spread.
    """
    batch_mean = x.mean(0)
    total = count + len(x)
    return Merge(x - batch_mean, batch_mean - mean, count * len(x) / total, len(x) / total)


class SecondMoment:
    """Running mean (d,) and centred scatter Σ (x-μ)(x-μ)ᵀ (d, d) of the rows it is given, merged by `merge`."""

    def __init__(self, dim: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=dtype, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=dtype, device=device)

    def update(self, x: Tensor) -> Merge | None:
        """Add rows `x` (N, d); returns how, None where there are none."""
        if not len(x):
            return None
        batch = merge(self.count, self.mean, x.to(self.mean.dtype))
        add_gram(self.scatter, batch.centred).addr_(batch.shift, batch.shift, alpha=batch.weight)
        self.mean += batch.shift * batch.share
        self.count += len(x)
        return batch

    def covariance(self) -> Tensor:
        """Centred second moment E[(x-μ)(x-μ)ᵀ], (d, d) float64."""
        return self.scatter.to(torch.float64, copy=True).div_(self.count)

    def second_moment(self) -> Tensor:
        """Uncentred second moment E[xxᵀ], (d, d) float64."""
        mean = self.mean.double()
        return self.covariance().addr_(mean, mean)


@dataclass(frozen=True)
class Moments:
    """Moments by site, in a tensor store: `input(site)` of what it reads, `gradient(site)` (d_out, d_out) float64."""

    store: TensorStore
    device: torch.device

    def input(self, site: Site) -> SecondMoment:
        """Return the moments of the input of `site`."""
        moment = SecondMoment(0, device=self.device)
        moment.mean, moment.scatter = self.store.get(f"{site.input}.mean"), self.store.get(f"{site.input}.scatter")
        moment.count = int(self.store.get("count"))
        return moment

    def gradient(self, site: Site) -> Tensor:
        """Return G (d_out, d_out) of the output of `site`, float64."""
        return self.store.get(f"{site.name}.gradient").double()


def gather(
    source: Source,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    *,
    causal: bool,
    seed: int = 0,
    store: TensorStore | None = None,
    dtype: torch.dtype = torch.float32,
) -> Moments:
    """Run the dense model forward over `batches`, then backward block by block, and return the moments of all `sites`.

    Padding does not count. One block is in memory at a time; the states between blocks, and the moments, are in the
    store. Raises BadInput if an activation is not finite.
    """
    store = store or TensorStore()
    stream = Stream(source, batches)
    _run_forward(stream, store)
    gradients = _output_gradients(stream, causal, seed)
    stream.hidden.clear()
    for index in track(range(len(source.names) - 1, -1, -1), "calibrating, backward"):
        inside = [site for site in sites if site.name.startswith(f"{source.names[index]}.")]
        with (
            source.block(index) as block,
            _watching(block, source.names[index], inside, stream.block_masks, dtype) as watch,
        ):
            for batch in range(len(batches)):
                watch.batch = batch
                states = store.take(f"states.{index}.{batch}").detach().requires_grad_()
                with torch.enable_grad():
                    output = stream.call(block, batch, states, position=index)
                (gradients[batch],) = grad(output, states, gradients[batch])
            _cut_graphs(block)
        watch.save(store)
    return Moments(store, source.device)


def _cut_graphs(block: nn.Module) -> None:
    """Detach what modules of a block remember of their last run (RecurrentGemma): it holds the graph, and cannot be
    copied."""
    for module in block.modules():
        for name, value in list(vars(module).items()):
            if torch.is_tensor(value) and value.grad_fn is not None:
                setattr(module, name, value.detach())


def _run_forward(stream: Stream, store: TensorStore) -> None:
    """Run every block, and store the states that enter it. Raises BadInput where they are not finite."""
    for index in track(range(len(stream.names)), "calibrating, forward"):
        for batch, states in enumerate(stream.hidden):
            store.put(f"states.{index}.{batch}", states)
        with stream.source.block(index) as block:
            stream.advance(block)
        rows = (states[mask] for states, mask in zip(stream.hidden, stream.masks, strict=True))
        if not all(bool(states.isfinite().all()) for states in rows):
            raise BadInput(f"what {stream.names[index]} puts out is NaN or infinite on the calibration text")


def _output_gradients(stream: Stream, causal: bool, seed: int) -> list[Tensor]:
    """Gradient, by the states that leave the last block, of the log-likelihood of labels that the model draws, or of
    one random direction of each text's normalised embedding."""
    gradients = []
    for index, hidden in enumerate(track(stream.hidden, "calibrating, output")):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        rows = len(hidden)
        if causal:
            rows = rows_at_once(hidden.shape[1] * stream.vocab_size, COPIES)
        parts: list[Tensor] = []
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            states = hidden[part].detach().requires_grad_()
            with torch.enable_grad():
                output = stream.finish(index, states, part, head=causal).float()
                parts += grad(_draw(output, stream.masks[index][part], causal, generator), states)
        gradients.append(torch.cat(parts))
    return gradients


def _draw(output: Tensor, mask: Tensor, causal: bool, generator: torch.Generator) -> Tensor:
    if causal:
        logits = output[mask]
        summed = logits.detach().softmax(-1).cumsum(-1)
        level = torch.rand(len(logits), 1, generator=generator).to(logits.device) * summed[:, -1:]
        drawn = torch.searchsorted(summed, level)[:, 0]
        return cross_entropy(logits, drawn, reduction="sum")
    pooled = normalize(mean_pooled(output, mask), dim=1)
    return (pooled * torch.randn(pooled.shape, generator=generator).to(pooled.device)).sum()


class _MomentHooks:
    """Moments of the sites of one block, while it runs forward and backward. `batch`: the one that runs."""

    def __init__(self, sites: Sequence[Site], masks: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.sites, self.masks, self.dtype, self.batch = sites, masks, dtype, 0
        self.inputs: dict[str, SecondMoment] = {}
        self.gradients: dict[str, Tensor] = {}

    def see(self, site: Site, _module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        """Take the input of a site now, and its output's gradient when it comes."""
        x = args[0]
        kept = self.masks[self.batch].reshape(-1)
        if x.numel() != len(kept) * site.d_in:
            raise BadInput(f"{site.name} reads other inputs than the tokens' states: keep it dense with --ignore")
        if site.input == site.name:
            if site.name not in self.inputs:
                self.inputs[site.name] = SecondMoment(site.d_in, self.dtype, x.device)
            self.inputs[site.name].update(x.detach().reshape(-1, site.d_in)[kept])

        def back(gradient: Tensor) -> None:
            rows = gradient.reshape(-1, site.d_out)[kept].to(self.dtype)
            if site.name not in self.gradients:
                self.gradients[site.name] = torch.zeros(site.d_out, site.d_out, dtype=self.dtype, device=x.device)
            add_gram(self.gradients[site.name], rows)

        y.register_hook(back)

    def save(self, store: TensorStore) -> None:
        """Store the moments. Raises BadInput where it is not finite."""
        for name, moment in self.inputs.items():
            if not bool(torch.isfinite(moment.scatter).all() & torch.isfinite(moment.mean).all()):
                raise BadInput(
                    f"the input of {name} is NaN or infinite on the calibration text: no moments can be taken"
                )
            store.put(f"{name}.mean", moment.mean)
            store.put(f"{name}.scatter", moment.scatter)
            store.put("count", torch.tensor(moment.count))
        for site in self.sites:
            gradient = self.gradients.get(site.name)
            if gradient is None or not bool(torch.isfinite(gradient).all()):
                raise BadInput(f"the gradient at {site.name} is missing or not finite: no moments can be taken")
            count = sum(int(mask.sum()) for mask in self.masks)
            store.put(f"{site.name}.gradient", gradient / count)


@contextmanager
def _watching(
    block: nn.Module, name: str, sites: Sequence[Site], masks: Sequence[Tensor], dtype: torch.dtype
) -> Iterator[_MomentHooks]:
    """Watch the projections of a block, whose name is `name`."""
    watch = _MomentHooks(sites, masks, dtype)
    with hooked(block, after=[(site.name.removeprefix(f"{name}."), partial(watch.see, site)) for site in sites]):
        yield watch
