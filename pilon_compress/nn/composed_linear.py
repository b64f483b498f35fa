"""The projection that composes: it takes the place of one nn.Linear (or GPT-2 Conv1D) and borrows its bank."""

import torch
from torch import Tensor, nn

from pilon_compress.nn.bank import PrimitiveBank
from pilon_compress.nn.part import Projection
from pilon_compress.nn.router import Router
from pilon_compress.nn.sharded import full

COMPOSITIONS = ("component", "scalar", "softmax")


class ComposedLinear(Projection, nn.Module):
    """`x` (..., d_in) -> (..., d_out), composed from `top_k` of the bank's primitives.

    composition   weight    meaning
    component     (k, r)    a signed coefficient for every component of every selected primitive (default)
    scalar        (k, 1)    one signed coefficient per selected primitive
    softmax       (n, 1)    logits over the whole bank; the k largest are selected and renormalised (original PILON)

    `group`: inputs that share a scale of a quantiser, 0 for all of a token's. `router`: that of the block, where the
    projection holds a recipe for each of its experts: `weight` (E, k, r), `selected` (E, k). It then computes rows that
    are sorted by expert, within the block's forward pass alone; or, where the router mixes recipes, over one selection
    (k,), all rows with coefficients of their own.

    The composition tensor is called `weight` on purpose: a checkpoint that is loaded without this package meets a
    stock layer with another shape and fails, instead of running on random weights.
    """

    bank: PrimitiveBank
    selected: Tensor
    router: Router | None

    def __init__(
        self,
        bank: PrimitiveBank,
        top_k: int,
        bias: bool,
        composition: str = "component",
        host_shape: tuple[int, int] | None = None,
        group: int = 0,
        router: Router | None = None,
    ) -> None:
        super().__init__()
        if composition not in COMPOSITIONS:
            raise ValueError(f"composition {composition!r} is none of {', '.join(COMPOSITIONS)}")
        if not 1 <= top_k <= bank.n_primitives:
            raise ValueError(f"top_k {top_k} is not between 1 and the bank's {bank.n_primitives} primitives")
        # borrowed, not registered: one owner, one key in the checkpoint, one storage, one optimiser entry
        object.__setattr__(self, "bank", bank)
        object.__setattr__(self, "router", router)
        self.experts = 1 if router is None else router.recipes
        self.composition, self.top_k, self.group = composition, top_k, group
        self.in_features, self.out_features = bank.d_in, bank.d_out
        self.host_shape = host_shape or (bank.d_in, bank.d_out)
        shape = {"component": (top_k, bank.rank), "scalar": (top_k, 1), "softmax": (bank.n_primitives, 1)}[composition]
        each = () if router is None else (self.experts,)
        self.weight = nn.Parameter(torch.empty(*each, *shape))
        rows = () if router is None else router.selections
        if composition != "softmax":
            self.register_buffer("selected", torch.arange(top_k).expand(*rows, top_k).clone())
        self.bias = nn.Parameter(torch.zeros(bank.d_out)) if bias else None

    def own_types(self) -> dict[str, torch.dtype]:
        """Return the tensors that keep a dtype of their own."""
        return {"weight": torch.float32} if self.bank.exact_compositions else {}

    def refuse(self) -> str | None:
        """Return why the loaded tensors are damaged, or None."""
        if self.bank.exact_compositions and not (torch.isfinite(self.weight).all() and self.weight.any()):
            return "holds scales that are zero or not finite"
        return None

    def optimizer_group(self, leaf: str) -> str | None:
        """Return the parameter group of the parameter `leaf`; None for the bias."""
        return None if leaf == "bias" else "compositions"

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """`selected` (k,) int64 and the weight (k, r) or (k, 1) that each selected primitive gets.

        With experts both have a row for each, (E, k) and (E, k, r), but for a selection that they share.
        """
        if self.composition != "softmax":
            return self.selected, self.weight
        top = self.weight[:, 0].topk(self.top_k)
        return top.indices, top.values.softmax(0)[:, None]

    @property
    def moves(self) -> bool:
        """True if the primitives or components that take part may change from one training step to the next."""
        return self.composition == "softmax"

    def used(self) -> Tensor:
        """Mask (n,), bool, of the bank's primitives that the layer selects as it stands."""
        used = torch.zeros(self.bank.n_primitives, dtype=torch.bool, device=self.weight.device)
        if self.composition == "softmax":
            return used.index_fill(0, full(self.weight).detach()[:, 0].topk(self.top_k).indices, True)
        return used.index_fill(0, self.selected.flatten(), True)

    def active(self) -> Tensor:
        """Mask (r,), bool, of the components of rank that take part: all of a plain layer."""
        return torch.ones(self.bank.rank, dtype=torch.bool, device=self.weight.device)

    def spread(self) -> Tensor:
        """Weight (n, r) or (n, 1) of every primitive of the bank as it stands, 0 of those that are not selected.

        With experts it is the root mean square over them.
        """
        weight, used = full(self.weight).detach(), self.used()
        if self.composition == "softmax":
            return weight[:, 0].masked_fill(~used, float("-inf")).softmax(0)[:, None]
        empty = weight.new_zeros(len(used), weight.shape[-1])
        if self.experts == 1:
            return empty.index_copy(0, self.selected, weight)
        places = self.selected.expand(self.experts, -1).flatten()
        return empty.index_add(0, places, weight.flatten(0, 1).square() / self.experts).sqrt()

    def energy(self) -> Tensor:
        """Energy (n,) of each primitive as it stands: the sum over components of (g · ‖a‖ · ‖b‖)²."""
        return (self.spread() * self.bank.sizes()).square().sum(1)

    def settle(self) -> None:
        """Make a selection that moves in training final; that of a plain layer is."""

    def settled(self, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """`state`, the whole state of a settled model, with what lies below `prefix` as a plain layer's."""
        return state

    @torch.no_grad()
    def keep(self, used: Tensor) -> None:
        """Follow a bank that drops the primitives for which `used` (n,) is False; the layer selects none of them."""
        if self.composition == "softmax":
            self.weight = nn.Parameter(self.weight[used].clone())
        else:
            self.selected.copy_((used.cumsum(0) - 1)[self.selected])

    def forward(self, x: Tensor) -> Tensor:
        """Compute `x` (..., d_in) -> (..., d_out)."""
        y = self.compose(x)
        if y.device != x.device:  # a bank shared by layers on several devices lives on one of them
            y = y.to(x.device)
        return y if self.bias is None else y + self.bias

    def compose(self, x: Tensor) -> Tensor:
        """`x` (..., d_in) -> (..., d_out), without the bias."""
        if self.router is not None:
            return self._by_expert(x, self.router)
        y: Tensor = self.bank(x, *self.coefficients(), self.group)
        return y

    def _by_expert(self, x: Tensor, router: Router) -> Tensor:
        """Compute the rows `x` (..., d_in) with experts: each segment with one, or each row with its mixed recipe."""
        rows = x.reshape(-1, x.shape[-1])
        if router.mix == "recipes":
            mixed: Tensor = self.bank(rows, self.selected, router.coefficients(self.weight), self.group)
            return mixed.view(*x.shape[:-1], mixed.shape[-1])
        # one call of the bank, however many experts have rows: FSDP reduces its gradient once for each
        y: Tensor = self.bank(rows, self.selected, self.weight, self.group, segments=router.segments())
        return y.view(*x.shape[:-1], y.shape[-1])

    def affine(self) -> tuple[Tensor, Tensor | None]:
        """Factor and shift of the latent, (k, r) or (k, 1): see `PrimitiveBank.affine`."""
        return self.bank.affine(self.coefficients()[1])

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        bank = self.bank
        return (
            f"d_in={bank.d_in}, d_out={bank.d_out}, top_k={self.top_k} of {bank.n_primitives}, rank={bank.rank}, "
            f"composition={self.composition}, bias={self.bias is not None}"
            + (f", experts={self.experts}" if self.experts > 1 else "")
        )
