"""The layout: which projection composes from which bank, which stays one matrix, and all sizes; kept in config.json."""

from collections.abc import Collection, Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from pilon_compress.form.bank import PrimitiveBank
from pilon_compress.form.composed import ComposedLinear
from pilon_compress.form.int8 import Int8Embedding, Int8Linear, install_int8, installed
from pilon_compress.form.integers import KINDS, IntegerBank, IntegerLinear, Integers
from pilon_compress.form.kept import KeptLinear
from pilon_compress.form.packed import PackedBank, PackedLinear, scales_of
from pilon_compress.form.packing import PER_BYTE
from pilon_compress.form.ternary_bank import TernaryBank, TernaryLinear

Kept = KeptLinear | PackedLinear | IntegerLinear
PACKED = {f"ternary-{encoding}": encoding for encoding in PER_BYTE}
Host = Any  # a transformers PreTrainedModel; transformers imports this file while that class is being made
BANKS = "pilon_banks"  # where the base model owns its banks


@dataclass(frozen=True)
class BankSpec:
    """Shape of one bank, and what its numbers are: `quantization` none, ternary (in training), ternary-2bit or
    ternary-base3 (packed), or one of `integers.KINDS`."""

    d_in: int
    d_out: int
    n_primitives: int
    rank: int
    latent_scale: bool = False
    latent_bias: bool = False
    quantization: str = "none"
    learned_scale: bool = False


@dataclass(frozen=True)
class ProjectionSpec:
    """How one projection composes: the bank's name (`band0.up`), how many primitives, whether it adds a bias.

    `group` and `norm`: see `ComposedLinear`.
    """

    bank: str
    top_k: int
    bias: bool
    composition: str = "component"
    group: int = 0
    norm: bool = False
    shift: bool = False


@dataclass(frozen=True)
class KeptSpec:
    """A projection that stays one matrix: at the host's size, or smaller where its block lost neurons."""

    d_in: int
    d_out: int
    bias: bool
    quantization: str = "none"
    learned_scale: bool = False
    group: int = 0
    norm: bool = False


@dataclass(frozen=True)
class Layout:
    """Banks by name (`band0.up`); projections and kept matrices by module name below the base model (`h.0.mlp.c_fc`).

    `host`: (d_in, d_out) of the host model's projection, for those that lost inputs or outputs with the neurons of
    their block. The up, gate and down projections of one block agree on the neurons that are left. `rest`: what else
    is in 8 bits, as `form.int8` names it.
    """

    banks: dict[str, BankSpec]
    projections: dict[str, ProjectionSpec]
    kept: dict[str, KeptSpec] = field(default_factory=dict)
    host: dict[str, tuple[int, int]] = field(default_factory=dict)
    rest: dict[str, str] = field(default_factory=dict)

    @property
    def kinds(self) -> set[str]:
        """The quantizations of banks and kept matrices."""
        return {spec.quantization for spec in self.banks.values()} | {one.quantization for one in self.kept.values()}

    @property
    def quantized(self) -> bool:
        """Whether anything is stored otherwise than in plain numbers."""
        return bool(self.kinds - {"none"} or self.rest)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, without what is at its default: older versions read what they can compute."""
        plain: dict[str, Any] = {
            part: {name: _written(spec) for name, spec in getattr(self, part).items()}
            for part in ("banks", "projections", "kept")
        }
        plain["host"] = {name: list(shape) for name, shape in self.host.items()}
        return plain | ({"rest": self.rest} if self.rest else {})

    def shape(self, name: str) -> tuple[int, int]:
        """(d_in, d_out) of a projection as it is computed here."""
        spec = self.kept.get(name) or self.banks[self.projections[name].bank]
        return spec.d_in, spec.d_out

    def host_shape(self, name: str) -> tuple[int, int]:
        """(d_in, d_out) of the host model's projection of that name."""
        return self.host.get(name) or self.shape(name)

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
        kept = {name: _read(KeptSpec, entry, f"projection {name}") for name, entry in data.get("kept", {}).items()}
        host = {name: (int(d_in), int(d_out)) for name, (d_in, d_out) in data.get("host", {}).items()}
        return cls(banks, projections, kept, host, dict(data.get("rest", {})))

    def integers(self, quantization: str) -> "Layout":
        """The same with every bank and kept matrix in whole numbers."""
        banks = {name: replace(spec, quantization=quantization) for name, spec in self.banks.items()}
        kept = {name: replace(spec, quantization=quantization) for name, spec in self.kept.items()}
        return replace(self, banks=banks, kept=kept)

    def normed(self, places: Collection[str]) -> "Layout":
        """The same with an RMSNorm before the projections of those names."""
        projections = {name: replace(spec, norm=spec.norm or name in places) for name, spec in self.projections.items()}
        kept = {name: replace(spec, norm=spec.norm or name in places) for name, spec in self.kept.items()}
        return replace(self, projections=projections, kept=kept)

    def ternary(self, learned_scale: bool, grouped: Collection[str], group: int) -> "Layout":
        """The same in digits; inputs of the projections `grouped` share scales by `group`."""
        groups = dict.fromkeys(grouped, group)
        banks = {
            name: replace(spec, quantization="ternary", learned_scale=learned_scale)
            for name, spec in self.banks.items()
        }
        projections = {name: replace(spec, group=groups.get(name, 0)) for name, spec in self.projections.items()}
        kept = {
            name: replace(spec, quantization="ternary", learned_scale=learned_scale, group=groups.get(name, 0))
            for name, spec in self.kept.items()
        }
        return replace(self, banks=banks, projections=projections, kept=kept)

    @property
    def is_ternary(self) -> bool:
        """Whether anything is in digits."""
        return "ternary" in self.kinds

    def users(self, bank: str) -> list[str]:
        """Names of the projections that compose from `bank`."""
        return [name for name, spec in self.projections.items() if spec.bank == bank]


def _written(spec: Any) -> dict[str, Any]:
    values = {one.name: (getattr(spec, one.name), one.default) for one in fields(spec)}
    return {name: value for name, (value, default) in values.items() if default is MISSING or value != default}


def _read(kind: type, entry: dict[str, Any], where: str) -> Any:
    known = {one.name for one in fields(kind)}
    if unknown := set(entry) - known:
        raise ValueError(f"{where} has unknown fields {sorted(unknown)}: written by a newer pilon-compress?")
    try:
        return kind(**entry)
    except TypeError as error:
        raise ValueError(f"{where} is incomplete: {error}") from None


def install(model: Host, layout: Layout) -> Host:
    """Put a `ComposedLinear` or `KeptLinear` in the place of every projection of `layout`; parameters are left
    uninitialised.

    `model` may have a head or not. The banks go to its base model, once each, so that every
    head class reads the same keys. Raises ValueError if the model has no such projection or its shape differs.
    """
    base = model.base_model
    banks = {name: make_bank(spec) for name, spec in layout.banks.items()}
    for name in (*layout.projections, *layout.kept):
        try:
            dense = base.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the layout names {name}, which {type(base).__name__} does not have") from None
        expected = layout.host_shape(name)
        if linear_shape(dense) != expected:
            raise ValueError(f"{name} is {linear_shape(dense)} in the model, {expected} in the layout")
        base.set_submodule(name, _module(layout, name, banks))
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
    install_int8(model, layout.rest)
    no_split = getattr(base, "_no_split_modules", None)
    if no_split is not None:  # device_map="auto" must keep a bank on one device
        base._no_split_modules = [*no_split, "PrimitiveBank", "TernaryBank", "PackedBank", "IntegerBank"]
    return model


def make_bank(spec: BankSpec) -> PrimitiveBank:
    """An uninitialised bank. Raises ValueError for a quantization that is not known."""
    shape = (spec.d_in, spec.d_out, spec.n_primitives, spec.rank, spec.latent_scale, spec.latent_bias)
    if spec.quantization == "ternary":
        return TernaryBank(*shape, learned_scale=spec.learned_scale)
    if spec.quantization in PACKED:
        return PackedBank(*shape[:4], PACKED[spec.quantization])
    if spec.quantization in KINDS:
        return IntegerBank(*shape[:4], spec.quantization, *shape[4:])
    if spec.quantization != "none":
        raise ValueError(f"quantization {spec.quantization!r} is not known: written by a newer pilon-compress?")
    return PrimitiveBank(*shape)


def make_kept(spec: KeptSpec, host_shape: tuple[int, int]) -> Kept:
    """An uninitialised kept matrix. Raises ValueError for a quantization that is not known."""
    if spec.quantization == "ternary":
        return TernaryLinear(spec.d_in, spec.d_out, spec.bias, host_shape, spec.group, spec.norm, spec.learned_scale)
    if spec.quantization in PACKED:
        packed = PACKED[spec.quantization]
        return PackedLinear(spec.d_in, spec.d_out, spec.bias, host_shape, packed, spec.group, spec.norm)
    if spec.quantization in KINDS:
        return IntegerLinear(spec.d_in, spec.d_out, spec.bias, host_shape, spec.quantization, spec.norm)
    if spec.quantization != "none":
        raise ValueError(f"quantization {spec.quantization!r} is not known: written by a newer pilon-compress?")
    return KeptLinear(spec.d_in, spec.d_out, spec.bias, host_shape, spec.norm)


def _module(layout: Layout, name: str, banks: dict[str, PrimitiveBank]) -> nn.Module:
    host_shape = layout.host_shape(name)
    if name in layout.kept:
        return make_kept(layout.kept[name], host_shape)
    spec = layout.projections[name]
    return ComposedLinear(
        banks[spec.bank], spec.top_k, spec.bias, spec.composition, host_shape, spec.group, spec.norm, spec.shift
    )


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of an nn.Linear, a GPT-2 Conv1D (whose weight is stored (in, out)) or a projection of ours."""
    if isinstance(module, nn.Linear | PackedLinear | IntegerLinear):
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


def kept_matrices(model: Host) -> Iterator[tuple[str, Kept]]:
    """Every projection of a PILON model that stays one matrix, by module name below the base model."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, Kept):
            yield name, module


def banks(model: Host) -> Iterator[tuple[str, PrimitiveBank]]:
    """Every bank of a PILON model by its layout name (`band0.up`)."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, PrimitiveBank):
            yield name.removeprefix(f"{BANKS}."), module


def stored_types(model: Host) -> dict[str, torch.dtype]:
    """By name, the type of tensors that are stored in their own, whatever that of the model."""
    found = dict.fromkeys(scales_of(model), torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, Integers):
            found[f"{name}.scale"] = torch.bfloat16
        elif isinstance(module, Int8Linear | Int8Embedding):
            found[f"{name}.scale"] = torch.float32
    return found


def layout_of(model: Host) -> Layout:
    """Read the layout back from an installed model."""
    names = {id(bank): name for name, bank in banks(model)}
    specs = {name: _bank_spec(bank) for name, bank in banks(model)}
    composed = {
        name: ProjectionSpec(
            names[id(p.bank)],
            p.top_k,
            p.bias is not None,
            p.composition,
            p.group,
            p.norm is not None,
            p.shift is not None,
        )
        for name, p in projections(model)
    }
    kept = {name: _kept_spec(matrix) for name, matrix in kept_matrices(model)}
    shapes = {name: (m.host_shape, linear_shape(m)) for name, m in projections(model)}
    shapes |= {name: (m.host_shape, linear_shape(m)) for name, m in kept_matrices(model)}
    host = {name: whole for name, (whole, own) in shapes.items() if whole != own}
    return Layout(specs, composed, kept, host, installed(model))


def _bank_spec(bank: PrimitiveBank) -> BankSpec:
    options = bank.latent_scale is not None, bank.latent_bias is not None
    shape = (bank.d_in, bank.d_out, bank.n_primitives, bank.rank)
    if isinstance(bank, TernaryBank):
        return BankSpec(*shape, *options, "ternary", bank.A_scale is not None)
    if isinstance(bank, PackedBank):
        return BankSpec(*shape, *options, f"ternary-{bank.encoding}")
    if isinstance(bank, IntegerBank):
        return BankSpec(*shape, *options, bank.A.quantization)
    return BankSpec(*shape, *options)


def _kept_spec(matrix: Kept) -> KeptSpec:
    shape = (matrix.in_features, matrix.out_features, matrix.bias is not None)
    if isinstance(matrix, TernaryLinear):
        return KeptSpec(*shape, "ternary", matrix.scale is not None, matrix.group, matrix.norm is not None)
    if isinstance(matrix, PackedLinear):
        return KeptSpec(*shape, f"ternary-{matrix.encoding}", False, matrix.group, matrix.norm is not None)
    if isinstance(matrix, IntegerLinear):
        return KeptSpec(*shape, matrix.quantization, norm=matrix.norm is not None)
    return KeptSpec(*shape, norm=matrix.norm is not None)
