"""Compositions while their selection or their size still moves. In training only: `settle` makes them plain again."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pilon_compress.nn.additions import carry
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.installed import projections
from pilon_compress.nn.sharded import full

BUFFERS = ("selected", "mask", "components", "open")


class StagedLinear(ComposedLinear):
    """A ComposedLinear whose primitives and components come and go, in one graph: only buffers change, in place.

        candidates  m primitives, `selected` (m,) says which; `mask` (m,) what each counts, 0 for those that are out
        components  (r,) 1 or 0: the components of rank that take part
        weight      explored (n, r) or (n, 1): a row per primitive of the bank; softmax (n, 1); fixed (k, r) or (k, 1)
        gate        (n,) scores of primitives, where the selection is by score: its gradient goes straight through
                    the choice (Bengio et al., 2013), as if the mask were k · softmax(gate), until `open` is 0

    The first `width` candidates are computed: all while the choice moves, then k of them, at the price of one
    compilation.
    """

    mask: Tensor
    components: Tensor
    open: Tensor

    def __init__(
        self,
        plain: ComposedLinear,
        candidates: int,
        explored: bool = False,
        gated: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        bank, bias = plain.bank, plain.bias is not None
        super().__init__(bank, plain.top_k, bias, plain.composition, plain.host_shape, plain.group)
        self.explored, self.width = explored, candidates
        self.weight, self.bias = plain.weight, plain.bias
        if explored:
            signs = torch.randint(0, 2, (bank.n_primitives, plain.weight.shape[1]), generator=generator) * 2.0 - 1.0
            self.weight = nn.Parameter(signs * plain.weight.detach().abs().mean())
        whole = explored or plain.composition == "softmax"
        first = torch.arange(candidates) if whole else plain.selected.clone()
        self.register_buffer("selected", first)
        self.register_buffer("mask", torch.ones(candidates))
        self.register_buffer("components", torch.ones(bank.rank))
        self.register_buffer("open", torch.ones(()))
        self.gate = nn.Parameter(0.01 * torch.randn(bank.n_primitives, generator=generator)) if gated else None

    @property
    def moves(self) -> bool:
        """Return True if primitives or components may change between steps."""
        return True

    @property
    def chooses(self) -> bool:
        """True if every primitive of the bank may be selected."""
        return self.explored or self.composition == "softmax"

    def used(self) -> Tensor:
        """Return the mask (n,) of selected primitives."""
        counts = torch.zeros(self.bank.n_primitives, device=self.weight.device)
        return counts.index_add(0, self.selected, self.mask) > 0

    def active(self) -> Tensor:
        """Return the mask (r,) of active components."""
        return self.components > 0

    def spread(self) -> Tensor:
        """Return the weight of every primitive, 0 if not selected."""
        if self.explored:
            return full(self.weight).detach() * self.used()[:, None] * self.components
        return super().spread() * self.components

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """`selected` (width,) and weights (width, r), which are 0 for what takes no part."""
        selected, mask = self.selected[: self.width], self.mask[: self.width]
        weight = self.weight[selected] if self.chooses else self.weight
        if self.composition == "softmax":
            weight = weight.masked_fill(mask[:, None] == 0, float("-inf")).softmax(0)
        elif self.gate is None:
            weight = weight * mask[:, None]
        else:
            soft = self.top_k * self.gate.softmax(0)[selected] * self.open
            weight = weight * (mask + (soft - soft.detach()))[:, None]
        return selected, weight * self.components

    @torch.no_grad()
    def choose(self, scores: Tensor, count: int, among: int) -> None:
        """Let the `count` best by `scores` (n,) of the first `among` primitives take part.

        While an explored layer sums more than its k, each counts sqrt(k / count): its output keeps its variance.
        """
        limited = scores.clone()
        limited[among:] = float("-inf")
        count = min(count, among)
        self.selected.copy_(limited.topk(len(self.selected)).indices)
        self.mask.zero_()
        self.mask[:count] = (self.top_k / count) ** 0.5 if self.explored and count > self.top_k else 1.0

    def contributions(self) -> Tensor:
        """Size (n,) of what each primitive adds: |g_p| · ‖A_p‖ · ‖B_p‖ over its components; of softmax the logits."""
        weight = full(self.weight).detach()
        if self.composition == "softmax":
            return weight[:, 0]
        return (weight * self.bank.sizes()).norm(dim=1)

    def scores(self) -> Tensor:
        """Return the scores (n,) of the selection, without noise."""
        return self.contributions() if self.gate is None else full(self.gate).detach()

    def settle(self) -> None:
        """Make the choice that the plain layer would make: exactly k primitives, all components."""
        self.components.fill_(1)
        if self.composition == "softmax" or (self.explored and int((self.mask > 0).sum()) != self.top_k):
            self.choose(self.scores(), self.top_k, self.bank.n_primitives)
        self.mask.copy_(self.mask > 0)

    def settled(self, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Return `state` with the tensors of a plain layer."""
        found = {key: tensor for key, tensor in state.items() if key.removeprefix(prefix) not in ("gate", *BUFFERS)}
        if self.composition == "softmax":
            return found
        found[prefix + "selected"] = state[prefix + "selected"]
        if self.explored:
            chosen = state[prefix + "selected"][state[prefix + "mask"] > 0].sort().values
            found |= {prefix + "selected": chosen, prefix + "weight": found[prefix + "weight"][chosen]}
        return found


def staged(model: Any) -> Iterator[tuple[str, StagedLinear]]:
    """Yield every staged projection, by module name below the base model."""
    for name, module in projections(model):
        if isinstance(module, StagedLinear):
            yield name, module


def settle(model: Any) -> None:
    """Replace, in place, every staged projection by a plain one that computes the same."""
    for name, layer in list(staged(model)):
        layer.settle()
        bias = layer.bias is not None
        plain = ComposedLinear(layer.bank, layer.top_k, bias, layer.composition, layer.host_shape, layer.group)
        carry(layer, plain)
        plain.to(layer.weight.device)
        plain.load_state_dict(layer.settled(layer.state_dict(), ""))
        model.base_model.set_submodule(name, plain.train(layer.training))
