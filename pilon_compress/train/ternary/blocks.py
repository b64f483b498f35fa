"""Fit ternary blocks one after another to the dense model's states, each behind the rounded blocks before it.

After NanoQuant (ICML 2026), which corrects the error of earlier blocks and refines the factors of each block by
straight-through gradients before the next one is rounded. Its tokens are text, not steps: every block sees all of it.

    dense     x -> block 0 -> t0 -> block 1 -> t1        minimise  mean over tokens of |y - t|² / |t|²  over the
    rounded   x -> block 0 -> y0 -> block 1 -> y1        latent weights, scales, attention and norms of a block
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilon_compress.config.training import TrainRecipe
from pilon_compress.data.batch import Batch
from pilon_compress.distill.refine import split
from pilon_compress.io import signals
from pilon_compress.io.disk import atomic_file
from pilon_compress.kernels.reference import LEAST
from pilon_compress.models.hidden_states import Stream
from pilon_compress.models.source import Source
from pilon_compress.nn.installed import projections
from pilon_compress.nn.part import LatentPart
from pilon_compress.optimize import schedule
from pilon_compress.optimize.loop import Stopped
from pilon_compress.optimize.optimizers import make_optimizers
from pilon_compress.optimize.training import put, weights

log = logging.getLogger(__name__)

PASSES = 8  # of every block over the text


def fit_blocks(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Batch],
    recipe: TrainRecipe,
    folder: Path,
    quiet: bool = False,
    half: bool = False,
) -> None:
    """Fit the ternary `model` in place, block by block; every tenth of `batches` judges, and no block ends worse on it.

    Fitted blocks are files in `folder`: a run that was stopped goes on behind the last one. Banks that several blocks
    share keep their ternary weights. `half`: gradients are computed in bfloat16, where autocast allows. Raises
    BadInput for less than two sequences, and Stopped after a signal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    training, held = split(batches)
    theirs = [Stream(Source(teacher, False), some) for some in (training, held)]
    ours = [Stream(Source(model, False), some) for some in (training, held)]
    with signals.watched() as asked:
        for index, name in enumerate(ours[0].names):
            for stream in theirs:
                stream.advance(teacher.base_model.get_submodule(name))
            block = model.base_model.get_submodule(name)
            learning, path = nn.ModuleList([block, *_own_banks(model, block)]), folder / f"block-{index:03}.safetensors"
            if path.is_file():
                put(learning, load_file(path))
            else:
                fit = BlockFit(learning, ours, theirs, recipe, recipe.seed + index, half)
                before, after = fit.run(asked)
                with atomic_file(path) as part:
                    save_file(weights(learning), part)
                if not quiet:
                    log.info("block %d of %d: error %.4g -> %.4g", index + 1, len(ours[0].names), before, after)
            for stream in ours:
                stream.advance(block)


def _own_banks(model: PreTrainedModel, block: nn.Module) -> list[nn.Module]:
    """Return the banks that no other block composes from."""
    inside = {id(module) for module in block.modules()}
    layers = [layer for _, layer in projections(model)]
    shared = {id(layer.bank) for layer in layers if id(layer) not in inside}
    own = {id(layer.bank): layer.bank for layer in layers if id(layer) in inside}
    return [bank for key, bank in own.items() if key not in shared]


class BlockFit:
    """The fit of one block, with its banks: `learning`, whose first member is the block."""

    def __init__(
        self,
        learning: nn.ModuleList,
        ours: list[Stream],
        theirs: list[Stream],
        recipe: TrainRecipe,
        seed: int,
        half: bool = False,
    ) -> None:
        self.learning, self.recipe, self.seed, self.half = learning, recipe, seed, half
        self.ours, self.theirs = ours, theirs
        found: dict[int, Any] = {id(part): part for part in learning.modules() if isinstance(part, LatentPart)}
        self.parts = list(found.values())

    def run(self, asked: signals.EndRequest) -> tuple[float, float]:
        """Fit the block; return the error on the held-out text before and after. Raises Stopped after a signal."""
        before, start = self.judged(), weights(self.learning)
        optimizers = make_optimizers(self.learning, self.recipe.optimizer)
        steps = list(self.order())
        for done, index in enumerate(steps):
            if asked.code:
                raise Stopped(min(asked.code, 143))
            self.step(optimizers, index, (done + 0.5) / len(steps))
        after = self.judged()
        if not after < before:
            put(self.learning, start)
            after = before
        return before, after

    def order(self) -> Iterator[int]:
        """Yield the batches of every pass, in an order of its own."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(PASSES):
            yield from torch.randperm(len(self.ours[0].hidden), generator=generator).tolist()

    def step(self, optimizers: Sequence[torch.optim.Optimizer], index: int, share: float) -> None:
        """Take one step on a batch, at a share of the fit."""
        for part in self.parts:
            part.train()
            part.hold()
        with torch.autocast(self.ours[0].device.type, torch.bfloat16) if self.half else nullcontext():
            error = self.error(0, index)
        error.backward()
        if self.recipe.optimizer.clip is not None:
            nn.utils.clip_grad_norm_(self.learning.parameters(), self.recipe.optimizer.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * schedule.rate(self.recipe.schedule, share)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def error(self, which: int, index: int) -> Tensor:
        """Mean over a batch's tokens of the squared error over the squared size of the dense model's state."""
        ours, theirs = self.ours[which], self.theirs[which]
        mask = ours.masks[index]
        y = ours.call(self.learning[0], index, ours.hidden[index]).float()[mask]
        t = theirs.hidden[index].float()[mask]
        return ((y - t).square().sum(-1) / t.square().sum(-1).clamp_min(LEAST)).mean()

    @torch.no_grad()
    def judged(self) -> float:
        """Return the error on the held-out text, as the model computes when it is evaluated."""
        for part in self.parts:
            part.eval()
        return sum(float(self.error(1, index)) for index in range(len(self.ours[1].hidden))) / len(self.ours[1].hidden)
