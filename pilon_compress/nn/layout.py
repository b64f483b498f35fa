"""The layout: which projection composes from which bank, which stays one matrix, and all sizes; kept in config.json."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from pilon_compress.nn.additions import add, added, addition, entries, places_of
from pilon_compress.nn.bank import PrimitiveBank, banks_in
from pilon_compress.nn.composed_linear import COMPOSITIONS, ComposedLinear
from pilon_compress.nn.formats.registry import FORMATS
from pilon_compress.nn.int8 import install_int8, installed
from pilon_compress.nn.part import Matrix, Part, Projection

Host = Any  # a transformers PreTrainedModel; transformers imports this file while that class is being made
REST = ("linear", "embedding", "head")  # kinds of 8-bit layers, see `int8.installed`
WIDEST, LARGEST = 1 << 26, 1 << 40  # of one size, and of the numbers of one side of a bank
FORMER = {
    "latent_scale",
    "latent_bias",
    "learned_scale",
    "norm",
    "shift",
}  # fields of specifications in earlier layouts
BANKS = "pilon_banks"  # where the base model owns its banks


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
    """Bank name (`band0.up`), number of primitives, bias, composition and group: see `ComposedLinear`."""

    bank: str
    top_k: int
    bias: bool
    composition: str = "component"
    group: int = 0


@dataclass(frozen=True)
class DenseSpec:
    """A projection that stays one matrix: at the host's size, or smaller where its block lost neurons."""

    d_in: int
    d_out: int
    bias: bool
    quantization: str = "none"
    group: int = 0


# by key of config.json: the field of `Layout` and its specifications
PARTS = {"banks": ("banks", BankSpec), "projections": ("projections", ProjectionSpec), "kept": ("matrices", DenseSpec)}


@dataclass(frozen=True)
class Layout:
    """Banks by name (`band0.up`); projections and dense matrices by module name below the base model (`h.0.mlp.c_fc`).

    `host`: (d_in, d_out) of the host model's projection, for those that lost inputs or outputs with the neurons of
    their block. The up, gate and down projections of one block agree on the neurons that are left. `rest`: what else
    is in 8 bits, as `form.int8` names it. `research`: banks and projections by research module and kind of addition,
    see `nn.additions`.
    """

    banks: dict[str, BankSpec]
    projections: dict[str, ProjectionSpec]
    matrices: dict[str, DenseSpec] = field(default_factory=dict)
    host: dict[str, tuple[int, int]] = field(default_factory=dict)
    rest: dict[str, str] = field(default_factory=dict)
    research: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    @property
    def kinds(self) -> set[str]:
        """The quantizations of banks and dense matrices."""
        specs: list[BankSpec | DenseSpec] = [*self.banks.values(), *self.matrices.values()]
        return {spec.quantization for spec in specs}

    @property
    def quantized(self) -> bool:
        """Return True if any part is quantised."""
        return bool(self.kinds - {"none"} or self.rest)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, without what is at its default: older versions read what they can compute."""
        plain: dict[str, Any] = {
            key: {name: _written(spec) for name, spec in getattr(self, part).items()}
            for key, (part, _) in PARTS.items()
        }
        plain["host"] = {name: list(shape) for name, shape in self.host.items()}
        return plain | {part: getattr(self, part) for part in ("rest", "research") if getattr(self, part)}

    def shape(self, name: str) -> tuple[int, int]:
        """(d_in, d_out) of a projection as it is computed here."""
        spec = self.matrices.get(name) or self.banks[self.projections[name].bank]
        return spec.d_in, spec.d_out

    def host_shape(self, name: str) -> tuple[int, int]:
        """(d_in, d_out) of the host model's projection of that name."""
        return self.host.get(name) or self.shape(name)

    @classmethod
    def from_dict(cls, data: Any) -> "Layout":
        """Read what `to_dict` wrote. Raises ValueError, in one line, for anything else: see `_checked`."""
        parts = _table(data, "the layout")
        if unknown := set(parts) - {*PARTS, "host", "rest", "research"}:
            raise ValueError(f"the layout has unknown parts {sorted(unknown)}: written by a newer pilon-compress?")
        if lost := {"banks", "projections"} - set(parts):
            raise ValueError(f"the layout is incomplete: it lacks {min(lost)}")
        specs = dict[str, dict[str, Any]]()
        for key, (part, kind) in PARTS.items():
            table = _table(parts.get(key, {}), f"the layout's {key}")
            specs[part] = {name: _read(kind, entry, f"{key} {name}") for name, entry in table.items()}
        host = {name: _shape(shape, name) for name, shape in _table(parts.get("host", {}), "the layout's host").items()}
        rest = _table(parts.get("rest", {}), "the layout's rest")
        research = places_of(parts.get("research", {}))
        made = cls(specs["banks"], specs["projections"], specs["matrices"], host, rest, research)
        made._check()
        return made

    def _check(self) -> None:
        """Raise ValueError where parts of the layout contradict each other."""
        folders = {name[:end] for name in self.banks for end, letter in enumerate(name) if letter == "."}
        for name in self.banks:
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
        for name in self.host:
            if name not in self.projections and name not in self.matrices:
                raise ValueError(f"the layout's host names {name!r}, which it does not replace")
        for name, _, place in self.additions():
            if place not in self.banks and place not in self.projections and place not in self.matrices:
                raise ValueError(f"the layout's research.{name} names {place!r}, which it does not have")
        for name, kind in self.rest.items():
            if kind not in REST:
                raise ValueError(f"{name}: {kind!r} is none of {', '.join(REST)}")

    def in_format(self, quantization: str) -> "Layout":
        """Return the layout with every bank and matrix in the number format `quantization`."""
        banks = {name: replace(spec, quantization=quantization) for name, spec in self.banks.items()}
        matrices = {name: replace(spec, quantization=quantization) for name, spec in self.matrices.items()}
        return replace(self, banks=banks, matrices=matrices)

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
        return replace(self, banks=banks, projections=projections, matrices=matrices)

    @property
    def is_ternary(self) -> bool:
        """Return True if any part is ternary."""
        return "ternary" in self.kinds

    def users(self, bank: str) -> list[str]:
        """Names of the projections that compose from `bank`."""
        return [name for name, spec in self.projections.items() if spec.bank == bank]


def _written(spec: Any) -> dict[str, Any]:
    values = {one.name: (getattr(spec, one.name), one.default) for one in fields(spec)}
    return {name: value for name, (value, default) in values.items() if default is MISSING or value != default}


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no table: {value!r:.60}")
    return dict(value)


def _shape(value: Any, name: str) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"host {name} is no pair of sizes: {value!r:.60}")
    return _checked(value[0], "d_in", int, f"host {name}"), _checked(value[1], "d_out", int, f"host {name}")


def _read(kind: type, entry: Any, where: str) -> Any:
    """A specification of that `kind`. Raises ValueError for fields that are unknown, missing, or not `_checked`."""
    known = {one.name: one for one in fields(kind)}
    given = _table(entry, where)
    if older := set(given) & FORMER:
        raise ValueError(f"{where} has {min(older)}, of an earlier version: make the model again")
    if unknown := set(given) - set(known):
        raise ValueError(f"{where} has unknown fields {sorted(unknown)}: written by a newer pilon-compress?")
    if lost := [name for name, one in known.items() if one.default is MISSING and name not in given]:
        raise ValueError(f"{where} is incomplete: it lacks {lost[0]}")
    made = kind(**{name: _checked(value, name, known[name].type, where) for name, value in given.items()})
    if isinstance(made, BankSpec) and made.n_primitives * made.rank * max(made.d_in, made.d_out) > LARGEST:
        raise ValueError(f"{where} declares more than {LARGEST:,} numbers")
    return made


def _checked(value: Any, name: str, kind: Any, where: str) -> Any:
    """`value` of a field: its exact type, sizes from 1 (`group`: 0) to WIDEST, words that are known."""
    if type(value) is not kind:
        raise ValueError(f"{where}: {name} must be {kind.__name__}, not {value!r:.60}")
    if kind is int and not (0 if name == "group" else 1) <= value <= WIDEST:
        raise ValueError(f"{where}: {name} is {value}, which no model has")
    if name == "composition" and value not in COMPOSITIONS:
        raise ValueError(f"{where}: {name} {value!r} is not known: written by a newer pilon-compress?")
    if name == "quantization" and value not in FORMATS:
        newer = "written by a newer pilon-compress, or with a plug-in that PILON_PLUGINS must name?"
        raise ValueError(f"{where}: {name} {value!r} is not known: {newer}")
    return value


def install(model: Host, layout: Layout) -> Host:
    """Put a `ComposedLinear` or `DenseLinear`, uninitialised, in the place of every projection of `layout`.

    `model` may have a head or not: banks go to its base model, once each, so that every head class reads the same keys.
    Raises ValueError if the model has no such projection or its shape differs.
    """
    base = model.base_model
    banks = {
        name: FORMATS[spec.quantization].bank(spec.d_in, spec.d_out, spec.n_primitives, spec.rank)
        for name, spec in layout.banks.items()
    }
    for name in (*layout.projections, *layout.matrices):
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
    for name, kind, place in layout.additions():
        add(banks[place] if place in banks else base.get_submodule(place), name, kind)
    install_int8(model, layout.rest)
    label_parts(model)
    no_split = getattr(base, "_no_split_modules", None)
    if no_split is not None:  # device_map="auto" must keep a bank on one device
        base._no_split_modules = [*no_split, *sorted({type(bank).__name__ for bank in banks.values()})]
    return model


def _module(layout: Layout, name: str, banks: dict[str, PrimitiveBank]) -> nn.Module:
    host_shape = layout.host_shape(name)
    if name in layout.matrices:
        matrix = layout.matrices[name]
        return FORMATS[matrix.quantization].matrix(matrix.d_in, matrix.d_out, matrix.bias, host_shape, matrix.group)
    spec = layout.projections[name]
    return ComposedLinear(banks[spec.bank], spec.top_k, spec.bias, spec.composition, host_shape, spec.group)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of an nn.Linear, a GPT-2 Conv1D (whose weight is stored (in, out)) or a projection of ours."""
    if isinstance(module, nn.Linear | Projection):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        d_in, d_out = module.get_parameter("weight").shape
        return d_in, d_out
    raise ValueError(f"{type(module).__name__} is not a linear projection")


def projections(model: Host) -> Iterator[tuple[str, ComposedLinear]]:
    """Yield every composed projection of a PILON model, by module name below the base model."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, ComposedLinear):
            yield name, module


def dense_matrices(model: Host) -> Iterator[tuple[str, Any]]:
    """Yield every dense projection of a PILON model, a `Matrix`, by module name below the base model."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, Matrix):
            yield name, module


def banks(model: Host) -> Iterator[tuple[str, PrimitiveBank]]:
    """Yield every bank of a PILON model by its layout name (`band0.up`)."""
    for name, bank in banks_in(model.base_model):
        yield name.removeprefix(f"{BANKS}."), bank


def parts(model: Host) -> Iterator[tuple[str, Any]]:
    """Yield every `Part` by module name: banks, projections, int8 layers."""
    for name, module in model.named_modules():
        if isinstance(module, Part):
            yield name, module


def label_parts(model: Host) -> None:
    """Tell every `Part` its name in the model, which its messages begin with."""
    for name, part in parts(model):
        part.label = name


def stored_types(model: Host) -> dict[str, torch.dtype]:
    """By name, the type of tensors that are stored in their own, whatever that of the model."""
    found = dict[str, torch.dtype]()
    for name, module in parts(model):
        found |= {f"{name}.{tensor}": dtype for tensor, dtype in module.own_types().items()}
        for research, kind in added(module):
            found |= {f"{name}.{tensor}": torch.float32 for tensor in addition(research, kind).exact}
    return found


def layout_of(model: Host) -> Layout:
    """Read the layout back from an installed model."""
    names = {id(bank): name for name, bank in banks(model)}
    specs = {name: BankSpec(b.d_in, b.d_out, b.n_primitives, b.rank, b.format) for name, b in banks(model)}
    composed = {
        name: ProjectionSpec(names[id(p.bank)], p.top_k, p.bias is not None, p.composition, p.group)
        for name, p in projections(model)
    }
    matrices = {
        name: DenseSpec(m.in_features, m.out_features, m.bias is not None, m.format, m.group)
        for name, m in dense_matrices(model)
    }
    layers = [*projections(model), *dense_matrices(model)]
    host = {name: layer.host_shape for name, layer in layers if layer.host_shape != linear_shape(layer)}
    layout = Layout(specs, composed, matrices, host, installed(model))
    for name, research, kind in ((name, *one) for name, module in (*banks(model), *layers) for one in added(module)):
        layout = layout.with_addition(research, kind, [name])
    return layout
