"""Early exit: a gate lets a token skip its layer's feed-forward block, in whose place a cheap substitute answers.

    score    x · weight + bias       log of the predicted price: KL of the model's final predictions, in nats
    skip     score < threshold       the token's own hidden state decides: cached decoding and full passes agree
    y        the block's output, or of a token that skips it   (x · down) · up + mean

Attention always runs, so that key-value caches stay whole. Rows that skip are left out of the block's products; while
a model is trained or compiled, the block computes all rows and a mask chooses, to the same numbers.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pilon_compress.nn.extended import extend, retract
from pilon_compress.nn.part import Part
from pilon_compress.nn.specs import NEVER, ExitSpec

EXACT = ("weight", "bias")  # in float32 whatever the model's type: rounding would move tokens across the threshold


class ExitGate(Part, nn.Module):
    """The gate of one block (d -> d) with the block's substitute; buffers, since no optimiser trains them.

    `substitute`: rank of the linear map in it; 0: a constant, `mean`, alone
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    down: Tensor
    up: Tensor

    def __init__(self, d: int, threshold: float = NEVER, substitute: int = 0) -> None:
        super().__init__()
        self.d, self.threshold, self.substitute = d, threshold, substitute
        self.register_buffer("weight", torch.zeros(d, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(1, dtype=torch.float32))
        self.register_buffer("mean", torch.zeros(d))
        if substitute:
            self.register_buffer("down", torch.zeros(d, substitute))
            self.register_buffer("up", torch.zeros(substitute, d))

    def forward(self, x: Tensor) -> Tensor:
        """Return, for block inputs `x` (..., d), True (...) where a token skips the block."""
        score: Tensor = x.float() @ self.weight.float() + self.bias.float()
        return score < self.threshold

    def stand_in(self, x: Tensor) -> Tensor:
        """Return what takes the place of the block's output, (..., d), for inputs `x` (..., d)."""
        if not self.substitute:
            return self.mean.expand_as(x)
        return (x @ self.down) @ self.up + self.mean

    @property
    def spec(self) -> ExitSpec:
        """The specification of this gate in a layout."""
        return ExitSpec(self.d, self.threshold, self.substitute)

    def own_types(self) -> dict[str, torch.dtype]:
        """Return the tensors that keep their dtype when a model is cast."""
        return dict.fromkeys(EXACT, torch.float32)

    def refuse(self) -> str | None:
        """Return why the loaded gate is damaged; None if it is sound."""
        sound = all(bool(torch.isfinite(tensor).all()) for tensor in self.buffers())
        return None if sound else "holds numbers that are not finite"


class SkippingBlock(nn.Module):
    """Mixin, see `nn.extended`, of a feed-forward block whose tokens may skip it."""

    exit_gate: ExitGate

    def forward(self, states: Tensor) -> Any:
        """Compute the block for `states` (..., d), or its substitute for the tokens that skip it."""
        gate = self.exit_gate
        skip = gate(states)
        if self.training or torch.compiler.is_compiling():
            whole = super().forward(states)
            return torch.where(skip[..., None], gate.stand_in(states).to(whole.dtype), whole)
        rows, skip = states.reshape(-1, states.shape[-1]), skip.reshape(-1)
        kept = (~skip).nonzero()[:, 0]
        if len(kept) == len(rows):
            return super().forward(states)
        if not len(kept):
            return gate.stand_in(states)
        made = super().forward(rows.index_select(0, kept)[None])[0]
        skipped = skip.nonzero()[:, 0]
        other = gate.stand_in(rows.index_select(0, skipped)).to(made.dtype)
        both = made.new_empty(len(rows), made.shape[-1]).index_copy(0, kept, made).index_copy(0, skipped, other)
        return both.reshape(*states.shape[:-1], -1)


def add_gate(block: nn.Module, gate: ExitGate) -> None:
    """Let tokens skip `block`, in place, as `gate` decides. Raises ValueError for a block of another form."""
    if not maps_states(block):
        raise ValueError(f"{type(block).__name__} is no feed-forward block that takes hidden states alone")
    if not isinstance(block, SkippingBlock):
        extend(block, SkippingBlock)
    block.exit_gate = gate


def maps_states(block: nn.Module) -> bool:
    """Return True if the block's forward takes hidden states and needs nothing else."""
    if isinstance(block, SkippingBlock):
        return True
    try:
        first, *others = inspect.signature(block.forward).parameters.values()
    except (TypeError, ValueError):  # none, or none that can be read
        return False
    needed = [
        one for one in others if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    return not needed and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD)


def gated_blocks(model: Any) -> Iterator[tuple[str, SkippingBlock]]:
    """Yield every block with a gate, by module name below the base model, in layer order."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, SkippingBlock):
            yield name, module


def drop_gates(model: Any) -> int:
    """Take the gates off a model, in place; every token then runs every block. Returns how many there were."""
    found = list(gated_blocks(model))
    for _, block in found:
        del block.exit_gate
        retract(block, SkippingBlock)
    return len(found)
