"""Specifications of a layout's entries: dataclasses, and how they are written to and read from config.json."""

import math
from dataclasses import MISSING, dataclass, fields
from typing import Any

from pilon_compress.nn.composed_linear import COMPOSITIONS
from pilon_compress.nn.formats.registry import FORMATS
from pilon_compress.nn.neuron_linear import NEURON_ROLES
from pilon_compress.nn.router import GATES, MIXES, ROUTER_KINDS

NEVER = -1e4  # threshold below every predicted price: no token skips the block
WIDEST, LARGEST = 1 << 26, 1 << 40  # of one size, and of the numbers of one side of a bank
FORMER = {
    "latent_scale",
    "latent_bias",
    "learned_scale",
    "norm",
    "shift",
}  # fields of specifications in earlier layouts


@dataclass(frozen=True)
class BankSpec:
    """Shape of one bank, and the number format that it is in: `quantization`, a name in `formats.registry.FORMATS`."""

    d_in: int
    d_out: int
    n_primitives: int
    rank: int
    quantization: str = "none"


@dataclass(frozen=True)
class ProjectionSpec:
    """Bank name (`band0.up`), number of primitives, bias, composition and group: see `ComposedLinear`.

    experts: recipes that it holds, of which its block's router chooses (`Layout.routers`); 1 without a router
    """

    bank: str
    top_k: int
    bias: bool
    composition: str = "component"
    group: int = 0
    experts: int = 1


@dataclass(frozen=True)
class DenseSpec:
    """A projection that stays one matrix: at the host's size, or smaller where its block lost neurons."""

    d_in: int
    d_out: int
    bias: bool
    quantization: str = "none"
    group: int = 0


@dataclass(frozen=True)
class NeuronBankSpec:
    """Number and shape of the neurons of one bank: see `NeuronBank`. `group`: inputs of `down` that share a scale."""

    neurons: int
    d_in: int
    d_out: int
    gated: bool
    quantization: str = "none"
    group: int = 0


@dataclass(frozen=True)
class NeuronSpec:
    """A projection that uses `top_k` neurons of a bank: see `NeuronLinear`.

    bias: the dense projection has one   selection: the projection of its block that holds the selection; "" where the
    block uses all neurons   scaled: it has a scale for each neuron and, before the activation, a bias
    experts: as of `ProjectionSpec`
    """

    bank: str
    role: str
    top_k: int
    bias: bool
    selection: str = ""
    scaled: bool = True
    experts: int = 1


@dataclass(frozen=True)
class RouterSpec:
    """The router of a feed-forward block of inputs of `width`: see `Router`.

    shared: recipes beside the `experts` that are always on   mix: what of the chosen ones is added, outputs or recipes
    gates: weights of the chosen ones, their scores over their sum or ones
    """

    width: int
    experts: int
    top_k: int
    kind: str = "linear"
    shared: int = 0
    mix: str = "outputs"
    gates: str = "scores"

    @property
    def recipes(self) -> int:
        """Return the recipes that the block's projections hold."""
        return self.experts + self.shared

    @property
    def active(self) -> int:
        """Return the recipes that count for a token."""
        return self.top_k + self.shared

    @property
    def passes(self) -> int:
        """Return how often the block computes a token."""
        return self.active if self.mix == "outputs" else 1


@dataclass(frozen=True)
class ExitSpec:
    """The exit gate of a feed-forward block of hidden size `d`: see `exits.ExitGate`.

    threshold: log of the predicted price, KL in nats, below which a token skips the block
    substitute: rank of the linear map that answers in the block's place; 0: a constant alone
    """

    d: int
    threshold: float = NEVER
    substitute: int = 0


def written(spec: Any) -> dict[str, Any]:
    """Return the fields of a specification that are not at their default."""
    values = {one.name: (getattr(spec, one.name), one.default) for one in fields(spec)}
    return {name: value for name, (value, default) in values.items() if default is MISSING or value != default}


def table_of(value: Any, where: str) -> dict[str, Any]:
    """Return a copy of `value`, a table. Raises ValueError for anything else."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no table: {value!r:.60}")
    return dict(value)


def shape_of(value: Any, name: str) -> tuple[int, int]:
    """Read (d_in, d_out) of the dense projection `name`. Raises ValueError for anything else."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"host {name} is no pair of sizes: {value!r:.60}")
    return checked(value[0], "d_in", int, f"host {name}"), checked(value[1], "d_out", int, f"host {name}")


def read_spec(kind: type, entry: Any, where: str) -> Any:
    """A specification of that `kind`. Raises ValueError for fields that are unknown, missing, or not `checked`."""
    known = {one.name: one for one in fields(kind)}
    given = table_of(entry, where)
    if older := set(given) & FORMER:
        raise ValueError(f"{where} has {min(older)}, of an earlier version: make the model again")
    if unknown := set(given) - set(known):
        raise ValueError(f"{where} has unknown fields {sorted(unknown)}: written by a newer pilon-compress?")
    if lost := [name for name, one in known.items() if one.default is MISSING and name not in given]:
        raise ValueError(f"{where} is incomplete: it lacks {lost[0]}")
    made = kind(**{name: checked(value, name, known[name].type, where) for name, value in given.items()})
    numbers = 0
    if isinstance(made, BankSpec):
        numbers = made.n_primitives * made.rank * max(made.d_in, made.d_out)
    elif isinstance(made, NeuronBankSpec):
        numbers = made.neurons * max(made.d_in, made.d_out)
    if numbers > LARGEST:
        raise ValueError(f"{where} declares more than {LARGEST:,} numbers")
    return made


def checked(value: Any, name: str, kind: Any, where: str) -> Any:
    """Check the `value` of a field: its exact type, sizes from 1 (some from 0) to WIDEST, words that are known."""
    if type(value) is not kind:
        raise ValueError(f"{where}: {name} must be {kind.__name__}, not {value!r:.60}")
    if kind is int and not (0 if name in ("group", "shared", "substitute") else 1) <= value <= WIDEST:
        raise ValueError(f"{where}: {name} is {value}, which no model has")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{where}: {name} is {value}, which is no number")
    if name == "composition" and value not in COMPOSITIONS:
        raise ValueError(f"{where}: {name} {value!r} is not known: written by a newer pilon-compress?")
    if name == "role" and value not in NEURON_ROLES:
        raise ValueError(f"{where}: {name} {value!r} is not known: written by a newer pilon-compress?")
    if name == "mix" and value not in MIXES:
        raise ValueError(f"{where}: {name} {value!r} is not known: written by a newer pilon-compress?")
    if name == "gates" and value not in GATES:
        raise ValueError(f"{where}: {name} {value!r} is not known: written by a newer pilon-compress?")
    if name == "kind" and value not in ROUTER_KINDS:
        raise ValueError(f"{where}: {name} {value!r} is not known: written by a newer pilon-compress?")
    if name == "quantization" and value not in FORMATS:
        newer = "written by a newer pilon-compress, or with a plug-in that PILON_PLUGINS must name?"
        raise ValueError(f"{where}: {name} {value!r} is not known: {newer}")
    return value
