"""The layout: which projection composes from which bank, and all sizes. Plain data, kept in config.json."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from pilon_compress.form.bank import PrimitiveBank
from pilon_compress.form.composed import ComposedLinear

Host = Any  # a transformers PreTrainedModel; transformers imports this file while that class is being made
BANKS = "pilon_banks"  # where the base model owns its banks


@dataclass(frozen=True)
class BankSpec:
    """Shape of one `PrimitiveBank`."""

    d_in: int
    d_out: int
    n_primitives: int
    rank: int
    latent_scale: bool = False
    latent_bias: bool = False


@dataclass(frozen=True)
class ProjectionSpec:
    """How one projection composes: the bank's name (`band0.up`), how many primitives, whether it adds a bias."""

    bank: str
    top_k: int
    bias: bool
    composition: str = "component"


@dataclass(frozen=True)
class Layout:
    """Banks by name (`band0.up`) and projections by module name below the base model (`h.0.mlp.c_fc`)."""

    banks: dict[str, BankSpec]
    projections: dict[str, ProjectionSpec]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Layout":
        """Read what `to_dict` wrote. Raises ValueError on an unknown or missing field, or a bank that is not there."""
        banks = {name: _read(BankSpec, entry, f"bank {name}") for name, entry in data["banks"].items()}
        projections = {
            name: _read(ProjectionSpec, entry, f"projection {name}") for name, entry in data["projections"].items()
        }
        for name, spec in projections.items():
            if spec.bank not in banks:
                raise ValueError(f"projection {name} composes from bank {spec.bank!r}, which the layout does not have")
        return cls(banks, projections)

    def users(self, bank: str) -> list[str]:
        """Names of the projections that compose from `bank`."""
        return [name for name, spec in self.projections.items() if spec.bank == bank]


def _read(kind: type, entry: dict[str, Any], where: str) -> Any:
    known = {field.name for field in fields(kind)}
    if unknown := set(entry) - known:
        raise ValueError(f"{where} has unknown fields {sorted(unknown)}: written by a newer pilon-compress?")
    try:
        return kind(**entry)
    except TypeError as error:
        raise ValueError(f"{where} is incomplete: {error}") from None


def install(model: Host, layout: Layout) -> Host:
    """Put a `ComposedLinear` in the place of every projection of `layout`; parameters are left uninitialised.

    `model` may have a head or not. The banks go to its base model, once each, so that every
    head class reads the same keys. Raises ValueError if the model has no such projection or its shape differs.
    """
    base = model.base_model
    banks = {
        name: PrimitiveBank(s.d_in, s.d_out, s.n_primitives, s.rank, s.latent_scale, s.latent_bias)
        for name, s in layout.banks.items()
    }
    for name, spec in layout.projections.items():
        parent_name, _, leaf = name.rpartition(".")
        try:
            parent = base.get_submodule(parent_name)
            dense = getattr(parent, leaf)
        except AttributeError:
            raise ValueError(f"the layout names {name}, which {type(base).__name__} does not have") from None
        bank = banks[spec.bank]
        if linear_shape(dense) != (bank.d_in, bank.d_out):
            raise ValueError(f"{name} is {linear_shape(dense)} in the model, {(bank.d_in, bank.d_out)} in the layout")
        setattr(parent, leaf, ComposedLinear(bank, spec.top_k, spec.bias, spec.composition))
    tree = nn.ModuleDict()
    for name, bank in banks.items():
        *folders, leaf = name.split(".")
        node: nn.ModuleDict = tree
        for folder in folders:
            if folder not in node:
                node[folder] = nn.ModuleDict()
            child = node[folder]
            assert isinstance(child, nn.ModuleDict)
            node = child
        node[leaf] = bank
    setattr(base, BANKS, tree)
    no_split = getattr(base, "_no_split_modules", None)
    if no_split is not None:  # device_map="auto" must keep a bank on one device
        base._no_split_modules = [*no_split, "PrimitiveBank"]
    return model


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of an nn.Linear, a GPT-2 Conv1D (whose weight is stored (in, out)) or a ComposedLinear."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, ComposedLinear):
        return module.bank.d_in, module.bank.d_out
    if type(module).__name__ == "Conv1D":
        d_in, d_out = module.get_parameter("weight").shape
        return d_in, d_out
    raise ValueError(f"{type(module).__name__} is not a linear projection")


def projections(model: Host) -> Iterator[tuple[str, ComposedLinear]]:
    """Every composed projection of a PILON model, by module name below the base model."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, ComposedLinear):
            yield name, module


def banks(model: Host) -> Iterator[tuple[str, PrimitiveBank]]:
    """Every bank of a PILON model by its layout name (`band0.up`)."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, PrimitiveBank):
            yield name.removeprefix(f"{BANKS}."), module


def layout_of(model: Host) -> Layout:
    """Read the layout back from an installed model."""
    names = {id(bank): name for name, bank in banks(model)}
    specs = {
        name: BankSpec(b.d_in, b.d_out, b.n_primitives, b.rank, b.latent_scale is not None, b.latent_bias is not None)
        for name, b in banks(model)
    }
    composed = {
        name: ProjectionSpec(names[id(p.bank)], p.top_k, p.bias is not None, p.composition)
        for name, p in projections(model)
    }
    return Layout(specs, composed)
