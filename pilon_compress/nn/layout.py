"""The layout: which projection composes from which bank, which stays one matrix, and all sizes; kept in config.json."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from pilon_compress.nn.additions import entries, places_of
from pilon_compress.nn.neuron_linear import has_scale
from pilon_compress.nn.specs import (
    BankSpec,
    DenseSpec,
    ExitSpec,
    NeuronBankSpec,
    NeuronSpec,
    ProjectionSpec,
    RouterSpec,
    read_spec,
    shape_of,
    table_of,
    written,
)

Host = Any  # a transformers PreTrainedModel; transformers imports this file while that class is being made
REST = tuple(f"{kind}{number}" for number in ("", "-int4") for kind in ("linear", "embedding", "head"))  # see `nn.rest`
ROUTED = ("none", "ternary")  # number formats of banks that experts compose from
BANKS = "pilon_banks"  # where the base model owns its banks


# by key of config.json: the field of `Layout` and its specifications
PARTS = {
    "banks": ("banks", BankSpec),
    "projections": ("projections", ProjectionSpec),
    "kept": ("matrices", DenseSpec),
    "neuron_banks": ("neuron_banks", NeuronBankSpec),
    "neurons": ("neurons", NeuronSpec),
    "exits": ("exits", ExitSpec),
    "routers": ("routers", RouterSpec),
}
ALWAYS = ("banks", "projections", "kept")  # keys that are written even where they are empty


@dataclass(frozen=True)
class Layout:
    """Banks by name (`band0.up`); projections and dense matrices by module name below the base model (`h.0.mlp.c_fc`).

    `neuron_banks` by name (`band0`), `neurons`: the projections that use them. `exits`: gates by module name of their
    feed-forward block (`h.0.mlp`).
    `host`: (d_in, d_out) of the host model's projection, for those that lost inputs or outputs with the neurons of
    their block. The up, gate and down projections of one block agree on the neurons that are left. `rest`: what else
    is in 8 bits, as `form.int8` names it. `routers`: by module name of the feed-forward block, whose projections hold
    as many recipes. `research`: banks and projections by research module and kind of addition,
    see `nn.additions`.
    """

    banks: dict[str, BankSpec]
    projections: dict[str, ProjectionSpec]
    matrices: dict[str, DenseSpec] = field(default_factory=dict)
    host: dict[str, tuple[int, int]] = field(default_factory=dict)
    rest: dict[str, str] = field(default_factory=dict)
    research: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    neuron_banks: dict[str, NeuronBankSpec] = field(default_factory=dict)
    neurons: dict[str, NeuronSpec] = field(default_factory=dict)
    exits: dict[str, ExitSpec] = field(default_factory=dict)
    routers: dict[str, RouterSpec] = field(default_factory=dict)

    @property
    def replaced(self) -> list[str]:
        """Names of all projections that the layout replaces: none of a dense model."""
        return [*self.projections, *self.matrices, *self.neurons]

    @property
    def kinds(self) -> set[str]:
        """The quantizations of banks and dense matrices."""
        specs: list[BankSpec | DenseSpec | NeuronBankSpec]
        specs = [*self.banks.values(), *self.matrices.values(), *self.neuron_banks.values()]
        return {spec.quantization for spec in specs}

    @property
    def quantized(self) -> bool:
        """Return True if any part is quantised."""
        return bool(self.kinds - {"none"} or self.rest)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, without what is at its default: older versions read what they can compute."""
        plain: dict[str, Any] = {
            key: {name: written(spec) for name, spec in getattr(self, part).items()}
            for key, (part, _) in PARTS.items()
            if key in ALWAYS or getattr(self, part)
        }
        plain["host"] = {name: list(shape) for name, shape in self.host.items()}
        return plain | {part: getattr(self, part) for part in ("rest", "research") if getattr(self, part)}

    def shape(self, name: str) -> tuple[int, int]:
        """(d_in, d_out) of a projection as it is computed here."""
        if name in self.neurons:
            user = self.neurons[name]
            bank, wide = self.neuron_banks[user.bank], user.top_k * (2 if user.role == "gate_up" else 1)
            return (user.top_k, bank.d_out) if user.role == "down" else (bank.d_in, wide)
        spec = self.matrices.get(name) or self.banks[self.projections[name].bank]
        return spec.d_in, spec.d_out

    def host_shape(self, name: str) -> tuple[int, int]:
        """(d_in, d_out) of the host model's projection of that name."""
        return self.host.get(name) or self.shape(name)

    @classmethod
    def from_dict(cls, data: Any) -> "Layout":
        """Read what `to_dict` wrote. Raises ValueError, in one line, for anything else: see `specs.checked`."""
        parts = table_of(data, "the layout")
        if unknown := set(parts) - {*PARTS, "host", "rest", "research"}:
            raise ValueError(f"the layout has unknown parts {sorted(unknown)}: written by a newer pilon-compress?")
        if lost := {"banks", "projections"} - set(parts):
            raise ValueError(f"the layout is incomplete: it lacks {min(lost)}")
        specs = dict[str, dict[str, Any]]()
        for key, (part, kind) in PARTS.items():
            table = table_of(parts.get(key, {}), f"the layout's {key}")
            specs[part] = {name: read_spec(kind, entry, f"{key} {name}") for name, entry in table.items()}
        host = {
            name: shape_of(shape, name) for name, shape in table_of(parts.get("host", {}), "the layout's host").items()
        }
        rest = table_of(parts.get("rest", {}), "the layout's rest")
        research = places_of(parts.get("research", {}))
        made = cls(**specs, host=host, rest=rest, research=research)
        made._check()
        return made

    def _check(self) -> None:
        """Raise ValueError where parts of the layout contradict each other."""
        named = [*self.banks, *self.neuron_banks]
        folders = {name[:end] for name in named for end, letter in enumerate(name) if letter == "."}
        for name in named:
            if not all(part.isidentifier() and not hasattr(nn.ModuleDict, part) for part in name.split(".")):
                raise ValueError(f"{name!r} is no name for a bank")
            if name in folders:
                raise ValueError(f"bank {name} and banks inside it share their name")
        for name, spec in self.projections.items():
            bank = self.banks.get(spec.bank)
            if bank is None:
                raise ValueError(f"projection {name} composes from bank {spec.bank!r}, which the layout does not have")
            if spec.composition != "softmax" and spec.top_k > bank.n_primitives:
                raise ValueError(f"projection {name} selects {spec.top_k} of the {bank.n_primitives} of {spec.bank}")
            if name in self.matrices:
                raise ValueError(f"{name} is both composed and dense")
        for name, one in self.neurons.items():
            self._check_neurons(name, one)
        for name in self.exits:
            if not any(one.startswith(f"{name}.") for one in self.replaced):
                raise ValueError(f"the layout has an exit gate for {name!r}, of which it replaces no projection")
        self._check_routers()
        for name in self.host:
            if name not in self.replaced:
                raise ValueError(f"the layout's host names {name!r}, which it does not replace")
        for name, _, place in self.additions():
            if place not in self.banks and place not in self.projections and place not in self.matrices:
                raise ValueError(f"the layout's research.{name} names {place!r}, which it does not have")
        for name, kind in self.rest.items():
            if kind not in REST:
                raise ValueError(f"{name}: {kind!r} is none of {', '.join(REST)}")

    def _check_routers(self) -> None:
        for name, spec in self.routers.items():
            if spec.experts < 2 or spec.top_k > spec.experts:
                raise ValueError(f"the router of {name} chooses {spec.top_k} of {spec.experts} experts")
            inside = [one for one in self.replaced if self.router_of(one) == name]
            if not inside:
                raise ValueError(f"the layout has a router for {name}, and no projections there")
            if spec.kind == "neurons" and not all(
                one in self.neurons and self.neurons[one].selection for one in inside
            ):
                raise ValueError(f"the router of {name} scores neurons, and {inside[0]} selects none")
            if spec.kind == "neurons" and spec.mix != "outputs":
                raise ValueError(f"the router of {name} scores neurons of experts, whose recipes are mixed")
        users: dict[str, ProjectionSpec | NeuronSpec] = {**self.projections, **self.neurons}
        for name, user in users.items():
            router = self.routers.get(self.router_of(name))
            if user.experts != (router.recipes if router else 1):
                raise ValueError(f"projection {name} has {user.experts} experts, its block another number")
            store = self.banks.get(user.bank) or self.neuron_banks[user.bank]
            if router and store.quantization not in ROUTED:
                raise ValueError(f"projection {name} has experts, and its bank is in {store.quantization}")
            if router and isinstance(user, ProjectionSpec) and user.composition == "softmax":
                raise ValueError(f"projection {name} has experts, and a composition by softmax")
        if self.routers and (added := [place for _, _, place in self.additions()]):
            raise ValueError(f"the layout has experts, and additions of research to {added[0]}")
        for name in self.matrices:
            if self.router_of(name):
                raise ValueError(f"{name} is a dense matrix in a block with experts")

    def router_of(self, name: str) -> str:
        """Return the block whose router chooses the recipe of the projection `name`; "" for none."""
        return next((block for block in self.routers if name.startswith(f"{block}.")), "")

    def passes(self, name: str) -> int:
        """Return how often the projection `name` computes a token: 1 without a router."""
        block = self.router_of(name)
        return self.routers[block].passes if block else 1

    def selections(self, name: str) -> int:
        """Return how many selections the projection `name` holds: 1 without a router, and where recipes are mixed."""
        router = self.routers.get(self.router_of(name))
        return router.recipes if router and router.mix == "outputs" else 1

    def mixing(self, name: str, numbers: int) -> int:
        """Return the MACs per token of mixing recipes of so many numbers in the projection `name`."""
        router = self.routers.get(self.router_of(name))
        return router.recipes * numbers if router and router.mix == "recipes" else 0

    def _check_neurons(self, name: str, spec: NeuronSpec) -> None:
        bank, owner = self.neuron_banks.get(spec.bank), self.neurons.get(spec.selection)
        if bank is None:
            raise ValueError(f"projection {name} uses the bank {spec.bank!r}, which the layout does not have")
        if spec.role in ("gate", "gate_up") and not bank.gated:
            raise ValueError(f"projection {name} is a {spec.role}, and the neurons of {spec.bank} have no gates")
        if spec.top_k > bank.neurons or (spec.top_k < bank.neurons) != bool(spec.selection):
            raise ValueError(f"projection {name} selects {spec.top_k} of the {bank.neurons} neurons of {spec.bank}")
        if spec.selection and (owner is None or owner.selection != spec.selection or owner.bank != spec.bank):
            raise ValueError(f"projection {name} takes its selection from {spec.selection!r}, which has none for it")
        if owner is not None and owner.experts != spec.experts:
            raise ValueError(f"projection {name} has {spec.experts} experts, {spec.selection} {owner.experts}")
        if owner is not None and owner.top_k != spec.top_k:
            raise ValueError(f"projection {name} selects {spec.top_k} neurons, {spec.selection} {owner.top_k}")
        if spec.scaled and not has_scale(spec.role, bank.gated):
            raise ValueError(f"projection {name} has a scale, which an up projection beside a gate has not")
        if name in self.matrices or name in self.projections:
            raise ValueError(f"projection {name} of {spec.bank} contradicts the rest of the layout")

    def in_format(self, quantization: str) -> "Layout":
        """Return the layout with every bank and matrix in the number format `quantization`."""
        banks = {name: replace(spec, quantization=quantization) for name, spec in self.banks.items()}
        matrices = {name: replace(spec, quantization=quantization) for name, spec in self.matrices.items()}
        neurons = {name: replace(spec, quantization=quantization) for name, spec in self.neuron_banks.items()}
        return replace(self, banks=banks, matrices=matrices, neuron_banks=neurons)

    def additions(self) -> Iterator[tuple[str, str, str]]:
        """(research module, kind, bank or projection) of every addition."""
        return entries(self.research)

    def with_addition(self, name: str, kind: str, places: Iterable[str]) -> "Layout":
        """Return the layout with an addition of the research module `name` to more banks or projections."""
        kinds = self.research.get(name, {})
        both = {**kinds, kind: sorted({*kinds.get(kind, []), *places})}
        return replace(self, research={**self.research, name: both})

    def ternary(self, grouped: Collection[str], group: int) -> "Layout":
        """Return the layout with ternary weights; inputs of the projections `grouped` share scales by `group`."""
        groups = dict.fromkeys(grouped, group)
        banks = {name: replace(spec, quantization="ternary") for name, spec in self.banks.items()}
        projections = {name: replace(spec, group=groups.get(name, 0)) for name, spec in self.projections.items()}
        matrices = {
            name: replace(spec, quantization="ternary", group=groups.get(name, 0))
            for name, spec in self.matrices.items()
        }
        down = {spec.bank: groups.get(name, 0) for name, spec in self.neurons.items() if spec.role == "down"}
        neurons = {
            name: replace(spec, quantization="ternary", group=down.get(name, 0))
            for name, spec in self.neuron_banks.items()
        }
        return replace(self, banks=banks, projections=projections, matrices=matrices, neuron_banks=neurons)

    @property
    def is_ternary(self) -> bool:
        """Return True if any part is ternary."""
        return "ternary" in self.kinds

    def users(self, bank: str) -> list[str]:
        """Names of the projections that compose from `bank`, or use its neurons."""
        specs: dict[str, ProjectionSpec | NeuronSpec] = {**self.projections, **self.neurons}
        return [name for name, spec in specs.items() if spec.bank == bank]
