"""The router of a feed-forward block: it chooses, for every token, which of the block's recipes (experts) compute it.

    scores (N, E)     softmax of a linear map or a small MLP of the block's input, in float32; of kind neurons the
                      magnitude of the activation of each expert's first neuron, over their sum (CMoE's analytic router)
    chosen (N, K)     the `top_k` experts of the largest score + balance
    weights (N, K)    the scores of the chosen experts over their sum; with gates ones 1 each
    shared            further recipes that compute every token, with weight 1; they come first

An expert owns no matrices: it is a selection and a composition over a bank that all experts of a band read. With gates
ones experts whose selections are disjoint add up to the dense block: each is a slice of its neurons.

    mix outputs       every chosen expert computes the token, and their outputs are added, weighted
    mix recipes       the chosen experts' coefficients are added, weighted, over the one selection that all have:
                      the block computes the token once
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pilon_compress.nn.part import Part

ROUTER_KINDS = ("linear", "mlp", "neurons")
MIXES = ("outputs", "recipes")
GATES = ("scores", "ones")
NARROW = 4  # width of the block's input over that of the MLP's hidden layer


class Routing(NamedTuple):
    """Rows of a block's input, sorted by the recipe that computes them.

    tokens (M,) int64: the input row of every sorted row   places (N, K): the sorted rows of every token
    weights (N, K) float32   segments: (recipe, start, end) of the sorted rows of every recipe that has any
    """

    tokens: Tensor
    places: Tensor
    weights: Tensor
    segments: tuple[tuple[int, int, int], ...]


@dataclass
class Load:
    """Counts over the tokens that a router has seen: `counts` of each expert, the summed entropy of its scores (nats).

    tokens: how many they were
    """

    counts: Tensor
    entropy: Tensor | float = 0.0
    tokens: int = field(default=0)

    def add(self, counts: Tensor, entropy: Tensor, tokens: int) -> None:
        """Add the figures of one batch."""
        self.counts += counts
        self.entropy = self.entropy + entropy
        self.tokens += tokens

    def clear(self) -> None:
        """Begin to count anew."""
        self.counts, self.entropy, self.tokens = torch.zeros_like(self.counts), 0.0, 0


class Router(Part, nn.Module):
    """Route rows (N, width) to `top_k` of `experts` recipes, and to the `shared` ones that are always on.

    balance: added to the scores for the choice alone (DeepSeek-V3's balancing without a loss); zeros unless trained so
    watchers: `Load` objects that count what is routed
    terms: losses of the last forward pass that had gradients, for the training loop to take: see `take_terms`
    routing, mixture: those of the pass that is running, which the block's projections read
    scoring: True while a block with a router of kind neurons computes the first neuron of every expert
    activations (N, E): what it computed
    """

    balance: Tensor

    def __init__(
        self,
        width: int,
        experts: int,
        top_k: int,
        kind: str = "linear",
        shared: int = 0,
        mix: str = "outputs",
        gates: str = "scores",
    ) -> None:
        super().__init__()
        self.width, self.experts, self.top_k, self.kind, self.shared = width, experts, top_k, kind, shared
        self.mix, self.gates = mix, gates
        if kind == "mlp":
            self.inner = nn.Parameter(torch.empty(max(1, width // NARROW), width))
        if kind != "neurons":
            self.weight = nn.Parameter(torch.empty(experts, width if kind == "linear" else max(1, width // NARROW)))
        self.register_buffer("balance", torch.zeros(experts))
        self.watchers: list[Load] = []
        self.terms: tuple[Tensor, Tensor] | None = None
        self.routing: Routing | None = None
        self.mixture: Tensor | None = None
        self.scoring, self.activations = False, torch.empty(0)

    def own_types(self) -> dict[str, torch.dtype]:
        """Return the tensors that keep a dtype of their own: steps of the balance are too small for 16 bits."""
        return {"balance": torch.float32}

    def refuse(self) -> str | None:
        """Return why the loaded tensors are damaged, or None."""
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in (*self.parameters(), self.balance))
        return None if finite else "holds numbers that are not finite"

    def optimizer_group(self, leaf: str) -> str | None:
        """Return the parameter group of the parameter `leaf`: one of its own, without weight decay."""
        return "routers"

    @torch.no_grad()
    def draw(self, std: float, generator: torch.Generator | None) -> None:
        """Fill the weights, in place, with N(0, std²), and the balance with zeros."""
        for parameter in self.parameters():
            parameter.normal_(0, std, generator=generator)
        self.balance.zero_()

    @property
    def recipes(self) -> int:
        """Return the number of recipes that the block's projections hold."""
        return self.shared + self.experts

    @property
    def selections(self) -> tuple[int, ...]:
        """Return the shape in front of a selection (k,): a row for each recipe, or () where all have one."""
        return (self.recipes,) if self.mix == "outputs" else ()

    def logits(self, rows: Tensor) -> Tensor:
        """Return the logits (N, E) of `rows` (N, width), in float32 whatever the model computes in, or more.

        Of kind neurons `rows` (N, E) are the activations of the experts' first neurons, and their magnitudes returned.
        """
        dtype = torch.promote_types(rows.dtype, torch.float32)
        if self.kind == "neurons":
            return rows.to(dtype).abs()
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.to(dtype)
            if self.kind == "mlp":
                rows = functional.gelu(functional.linear(rows, self.inner.to(dtype)))
            return functional.linear(rows, self.weight.to(dtype))

    def scores(self, logits: Tensor) -> Tensor:
        """Return the scores (N, E), whose sum is 1, of `logits` (N, E); magnitudes are too large for a softmax."""
        if self.kind != "neurons":
            return logits.softmax(-1)
        return logits / logits.sum(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chosen experts (N, K) of `scores` (N, E), the best first, and their weights (N, K)."""
        chosen = (scores + self.balance).topk(self.top_k, -1).indices
        best = scores.gather(1, chosen)
        if self.gates == "ones":  # with the gradient of the scores
            return chosen, torch.ones_like(best) + (best - best.detach())
        # one expert alone has weight 1 in any case: the gradient is then that of its own score (straight through)
        return chosen, best / (best.detach() if self.top_k == 1 else best.sum(-1, keepdim=True))

    def forward(self, rows: Tensor) -> Routing:
        """Route `rows` (N, width), or of kind neurons the activations (N, E): see `logits`."""
        logits = self.logits(rows)
        scores = self.scores(logits)
        chosen, weights = self.choose(scores)
        if self.shared:
            always = torch.arange(self.shared, device=rows.device).expand(len(rows), -1)
            chosen = torch.cat([always, chosen + self.shared], 1)
            weights = torch.cat([torch.ones_like(always, dtype=weights.dtype), weights], 1)
        order = chosen.flatten().argsort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        counts = chosen.flatten().bincount(minlength=self.recipes).cpu()
        self._note(logits, scores, counts[self.shared :].double())
        ends = counts.cumsum(0).tolist()
        spans = zip(range(self.recipes), [0, *ends], ends, strict=False)
        tokens = order.div(chosen.shape[1], rounding_mode="floor")
        return Routing(tokens, places.view_as(chosen), weights, tuple(span for span in spans if span[2] > span[1]))

    def mixed(self, rows: Tensor) -> Tensor:
        """Return the weights (N, recipes) of all recipes for `rows` (N, width), 0 of those that are not chosen."""
        logits = self.logits(rows)
        scores = self.scores(logits)
        chosen, weights = self.choose(scores)
        self._note(logits, scores, chosen.flatten().bincount(minlength=self.experts).cpu().double())
        mixture = torch.zeros_like(scores).scatter(1, chosen, weights)
        return torch.cat([torch.ones_like(mixture[:, : self.shared]), mixture], 1) if self.shared else mixture

    def coefficients(self, weight: Tensor) -> Tensor:
        """Return the coefficients (N, ...) of the rows of the pass that is running, mixed of `weight` (recipes, ...).

        Raises RuntimeError outside of a pass.
        """
        if self.mixture is None:
            raise RuntimeError(f"{self.label or 'the router'}: experts compute within their block alone")
        return (self.mixture.to(weight.dtype) @ weight.flatten(1)).unflatten(1, weight.shape[1:])

    def _note(self, logits: Tensor, scores: Tensor, counts: Tensor) -> None:
        """Keep the losses of this pass, and count for whoever watches."""
        if torch.is_grad_enabled() and len(scores):
            share = (counts / counts.sum()).to(scores)  # 1/E each where the load is even
            balance = self.experts * (share * scores.mean(0)).sum()
            self.terms = balance, logits.logsumexp(-1).square().mean()
        if self.watchers:
            entropy = torch.special.entr(scores.detach()).sum()
            for watcher in self.watchers:
                watcher.add(counts, entropy, len(scores))

    def take_terms(self) -> tuple[Tensor, Tensor] | None:
        """Return the load-balancing and the z-loss of the last pass with gradients, once; None without one.

        balance: E · Σ share of the assignments · mean score (Switch; 1 where both are even)   z: mean logsumexp²
        """
        terms, self.terms = self.terms, None
        return terms

    def segments(self) -> tuple[tuple[int, int, int], ...]:
        """Return the segments of the pass that is running. Raises RuntimeError outside of one."""
        if self.routing is None:
            raise RuntimeError(f"{self.label or 'the router'}: experts compute within their block alone")
        return self.routing.segments

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        own = f"{self.kind}, shared={self.shared}, mix={self.mix}, gates={self.gates}"
        return f"top_k={self.top_k} of {self.experts}, {own}"


class RoutedBlock(nn.Module):
    """Mixin of a feed-forward block whose tokens are routed: see `nn.extended`.

    The block's own forward pass runs once, on all rows sorted by recipe; its projections compute each segment with its
    recipe. There is no padding, and no copy of a bank. With mixed recipes it runs on the rows as they are. A router of
    kind neurons lets it run once before, over the first neuron of every expert.
    """

    router: Router

    def _seen(self, rows: Tensor) -> Tensor:
        """Return what the router scores: `rows` (N, d), or the activations (N, E) of the experts' first neurons."""
        router = self.router
        if router.kind != "neurons":
            return rows
        router.scoring = True
        try:
            with torch.no_grad():  # the choice has no gradient
                super().forward(rows[None])
            return router.activations
        finally:
            router.scoring, router.activations = False, torch.empty(0)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden: Tensor) -> Tensor:
        """Compute `hidden` (..., d) -> (..., d)."""
        router, rows = self.router, hidden.reshape(-1, hidden.shape[-1])
        if router.mix == "recipes":
            router.mixture = router.mixed(rows)
            try:
                return super().forward(hidden)
            finally:
                router.mixture = None
        routing: Routing = router(self._seen(rows))
        if not len(rows):
            return torch.zeros_like(hidden)
        router.routing = routing
        try:
            y = super().forward(rows.index_select(0, routing.tokens)[None])[0]
        finally:
            router.routing = None
        # sums in the order of the choice, not of the rows: the same on every device, with and without duplicates
        each = y.index_select(0, routing.places.flatten()).unflatten(0, routing.places.shape)
        mixed = (each * routing.weights[..., None].to(each.dtype)).sum(1)
        return mixed.view(*hidden.shape[:-1], -1)
