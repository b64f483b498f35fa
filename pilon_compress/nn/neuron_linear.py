"""The projections of a block whose neurons come from a bank: one in the place of each nn.Linear (or GPT-2 Conv1D).

    gate, or up of a block without one      s · (x W) + b          scale s (k,) before the activation, bias b (k,)
    up beside a gate                        x W
    down                                    (s' · h) W + b         scale s' (k,) behind the activation, bias b (d_out,)

Of a gated block the scales on the sides of up and down are one: that of down. A fused gate_up has those of its gate.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pilon_compress.nn.neuron_bank import NeuronBank, Selection
from pilon_compress.nn.part import Chosen, Projection
from pilon_compress.nn.router import Router

NEURON_ROLES = ("gate", "up", "gate_up", "down")


class NeuronLinear(Projection, nn.Module):
    """`x` (..., d_in) -> (..., d_out) by the selected neurons of a bank.

    selection: that of the block, None where it uses all neurons; the projection that `owns` it has it in the file
    scaled: it has a scale for each of its k neurons and, before the activation, a bias
    bias: it has the bias of the dense projection, of all outputs
    router: that of the block, where it has scales and biases for each of its experts: (E, k), see `ComposedLinear`

    The scale is called `weight`, and one that has none holds a single number of that name: a checkpoint that is loaded
    without this package meets a stock layer of another shape and fails, instead of running on random weights.
    """

    bank: NeuronBank
    selection: Selection | None
    router: Router | None
    weight: Tensor

    def __init__(
        self,
        bank: NeuronBank,
        role: str,
        selection: Selection | None = None,
        *,
        owns: bool = False,
        scaled: bool = True,
        bias: bool = False,
        host_shape: tuple[int, int] | None = None,
        router: Router | None = None,
    ) -> None:
        super().__init__()
        if role not in NEURON_ROLES or (role in ("gate", "gate_up") and not bank.gated):
            raise ValueError(f"a bank of neurons {'with' if bank.gated else 'without'} gates has no {role} projection")
        # borrowed, not registered: one owner, one key in the checkpoint, one storage, one optimiser entry
        object.__setattr__(self, "bank", bank)
        object.__setattr__(self, "router", router)
        self.experts = 1 if router is None else router.recipes
        each = () if router is None else (self.experts,)
        if owns or selection is None:
            self.selection = selection
        else:
            object.__setattr__(self, "selection", selection)
        self.role, self.owns = role, owns
        self.top_k = bank.neurons if selection is None else selection.top_k
        wide = self.top_k * (2 if role == "gate_up" else 1)
        shape = (self.top_k, bank.d_out) if role == "down" else (bank.d_in, wide)
        self.in_features, self.out_features = shape
        self.host_shape = host_shape or shape
        self.scaled, self.bias_of_dense = scaled, bias
        if scaled:
            self.weight = nn.Parameter(torch.ones(*each, self.top_k))
        else:
            self.register_buffer("weight", torch.ones(1))
        biased = biased_outputs(role, self.out_features, bias, scaled)
        self.bias = nn.Parameter(torch.zeros(*each, biased)) if biased else None

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the bank's matrices that it multiplies with, in the order of its outputs."""
        return ("gate", "up") if self.role == "gate_up" else (self.role,)

    def chosen(self) -> Chosen | None:
        """Return the block's selection; None where it uses all neurons."""
        return None if self.selection is None else self.selection()

    def optimizer_group(self, leaf: str) -> str | None:
        """Return the parameter group of the parameter `leaf`; None for the bias."""
        return "compositions" if leaf == "weight" else None

    def forward(self, x: Tensor) -> Tensor:
        """Compute `x` (..., d_in) -> (..., d_out)."""
        y = self._multiply(x) if self.router is None else self._by_expert(x.reshape(-1, x.shape[-1]), self.router)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if y.device == x.device else y.to(x.device)  # a shared bank lives on one of several devices

    def _multiply(self, x: Tensor) -> Tensor:
        chosen, scale = self.chosen(), self.weight if self.scaled else None
        if self.role == "down":
            y: Tensor = self.bank(x if scale is None else x * scale.to(x.dtype), "down", chosen)
        else:
            first, *others = [self.bank(x, role, chosen) for role in self.sources]
            first = first if scale is None else first * scale.to(first)
            y = torch.cat([first, *others], -1) if others else first
        return y if self.bias is None else y + self._wide_bias(self.bias).to(y.device)

    def _by_expert(self, x: Tensor, router: Router) -> Tensor:
        """Compute rows `x` (N, d_in) with experts; one call for each matrix: see `ComposedLinear`."""
        if router.scoring:
            return self._first_neurons(x, router)
        spans = router.segments() if router.mix == "outputs" else ()
        chosen = None if spans else self.chosen()
        segments = [(self.selection(e), start, end) for e, start, end in spans] if self.selection is not None else []

        def rows(tensor: Tensor) -> Tensor:
            if router.mix == "recipes":
                return router.coefficients(tensor)
            return torch.cat([tensor[expert].expand(end - start, -1) for expert, start, end in spans])

        scale = rows(self.weight) if self.scaled else None
        if self.role == "down":
            y: Tensor = self.bank(x if scale is None else x * scale.to(x.dtype), "down", chosen, segments)
        else:
            first, *others = [self.bank(x, role, chosen, segments) for role in self.sources]
            first = first if scale is None else first * scale.to(first)
            y = torch.cat([first, *others], -1) if others else first
        return y if self.bias is None else y + self._wide_bias(rows(self.bias)).to(y.device)

    def _first_neurons(self, x: Tensor, router: Router) -> Tensor:
        """Compute rows `x` (N, d_in) with the first neuron of every routed expert: (N, E), of gate_up (N, 2 E).

        The projection that reads neurons gives its rows (N, E) to the router, and returns zeros.
        """
        if self.role == "down":
            router.activations = x
            return x.new_zeros(len(x), self.out_features)
        assert self.selection is not None
        chosen = Chosen(self.selection(None).indices[router.shared :])
        first, *others = [self.bank(x, role, chosen) for role in self.sources]
        if self.scaled:
            first = first * self.weight[router.shared :, 0].to(first)
        y = torch.cat([first, *others], -1) if others else first
        if self.bias is None:
            return y
        halves = self._wide_bias(self.bias)[router.shared :].unflatten(1, (len(self.sources), self.top_k))
        return y + halves[:, :, 0].T.flatten().to(y)

    def _wide_bias(self, bias: Tensor) -> Tensor:
        missing = self.out_features - bias.shape[-1]
        return pad(bias, (0, missing)) if missing else bias

    @torch.no_grad()
    def matrix(self) -> tuple[Tensor, Tensor | None]:
        """Return the matrix (d_in, d_out) that it amounts to, the scale folded in, and the bias (d_out,) or None."""
        chosen = self.chosen()
        first, *others = [self.bank.part(role, chosen) for role in self.sources]
        if self.scaled:
            scale = self.weight[:, None] if self.role == "down" else self.weight
            first = (first.double() * scale.double()).to(self.weight.dtype)
        whole = torch.cat([first, *others], 1) if others else first
        return whole, None if self.bias is None else self._wide_bias(self.bias).clone()

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        return f"{self.role}, {self.top_k} of {self.bank.neurons} neurons, scaled={self.scaled}"


def has_scale(role: str, gated: bool) -> bool:
    """Return True for the projections of a block that may have a scale: all but up beside a gate."""
    return role != "up" or not gated


def biased_outputs(role: str, outputs: int, bias: bool, scaled: bool) -> int:
    """Count the `outputs` that have a bias, the first ones: all with `bias`, else those of a `scaled` activation."""
    if bias or role == "down" or not scaled:
        return outputs * bias
    return outputs // 2 if role == "gate_up" else outputs


def neuron_block(
    bank: NeuronBank, top_k: int, host_shapes: Mapping[str, tuple[int, int]], *, scaled: bool = True, bias: bool = False
) -> dict[str, NeuronLinear]:
    """Make the projections of one block by role, with scales 1 and biases 0; the first `top_k` neurons are selected.

    host_shapes: (d_in, d_out) by role of the projections that they replace, which have a `bias` or not
    """
    selection = Selection(bank.neurons, top_k) if top_k < bank.neurons else None
    return {
        role: NeuronLinear(
            bank,
            role,
            selection,
            owns=selection is not None and place == 0,
            scaled=scaled and has_scale(role, bank.gated),
            bias=bias,
            host_shape=shape,
        )
        for place, (role, shape) in enumerate(host_shapes.items())
    }


@torch.no_grad()
def fill_block(
    block: Mapping[str, NeuronLinear],
    selected: Tensor | None = None,
    scales: Mapping[str, Tensor] | None = None,
    biases: Mapping[str, Tensor] | None = None,
) -> None:
    """Copy a selection (k,), and scales and biases by role, into the projections of one block.

    Raises ValueError for one that the block has no place for, or lacks.
    """
    owners = [layer for layer in block.values() if layer.owns]
    if bool(owners) != (selected is not None):
        raise ValueError("a selection is for blocks that use a part of their bank, and needed by them")
    for layer in owners:
        assert layer.selection is not None and selected is not None
        layer.selection.selected.copy_(selected)
    for role, layer in block.items():
        if layer.scaled != (role in (scales or {})) or (layer.bias is not None) != (role in (biases or {})):
            raise ValueError(f"the scales or biases that are given for {role} are not those that it has")
        if scales and role in scales:
            layer.weight.copy_(scales[role])
        if biases and layer.bias is not None:
            layer.bias.copy_(biases[role])
