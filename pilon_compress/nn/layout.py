"""The layout: which projection composes from which bank, which stays one matrix, and all sizes; kept in config.json."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pilon_compress.nn.additions import add, added, addition, entries, places_of
from pilon_compress.nn.bank import PrimitiveBank, banks_in
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.formats.registry import FORMATS
from pilon_compress.nn.int8 import install_int8, installed
from pilon_compress.nn.neuron_bank import NeuronBank, Selection
from pilon_compress.nn.neuron_linear import NeuronLinear, has_scale
from pilon_compress.nn.part import Matrix, Part, Projection
from pilon_compress.nn.specs import (
    BankSpec,
    DenseSpec,
    NeuronBankSpec,
    NeuronSpec,
    ProjectionSpec,
    read_spec,
    shape_of,
    table_of,
    written,
)

Host = Any  # a transformers PreTrainedModel; transformers imports this file while that class is being made
REST = ("linear", "embedding", "head")  # kinds of 8-bit layers, see `int8.installed`
BANKS = "pilon_banks"  # where the base model owns its banks


# by key of config.json: the field of `Layout` and its specifications
PARTS = {
    "banks": ("banks", BankSpec),
    "projections": ("projections", ProjectionSpec),
    "kept": ("matrices", DenseSpec),
    "neuron_banks": ("neuron_banks", NeuronBankSpec),
    "neurons": ("neurons", NeuronSpec),
}
ALWAYS = ("banks", "projections", "kept")  # keys that are written even where they are empty


@dataclass(frozen=True)
class Layout:
    """Banks by name (`band0.up`); projections and dense matrices by module name below the base model (`h.0.mlp.c_fc`).

    `neuron_banks` by name (`band0`), `neurons`: the projections that use them.
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
    neuron_banks: dict[str, NeuronBankSpec] = field(default_factory=dict)
    neurons: dict[str, NeuronSpec] = field(default_factory=dict)

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
        for name in self.host:
            if name not in self.replaced:
                raise ValueError(f"the layout's host names {name!r}, which it does not replace")
        for name, _, place in self.additions():
            if place not in self.banks and place not in self.projections and place not in self.matrices:
                raise ValueError(f"the layout's research.{name} names {place!r}, which it does not have")
        for name, kind in self.rest.items():
            if kind not in REST:
                raise ValueError(f"{name}: {kind!r} is none of {', '.join(REST)}")

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


def install(model: Host, layout: Layout) -> Host:
    """Put a projection of ours, uninitialised, in the place of every projection of `layout`.

    `model` may have a head or not: banks go to its base model, once each, so that every head class reads the same keys.
    Raises ValueError if the model has no such projection or its shape differs.
    """
    base = model.base_model
    banks: dict[str, nn.Module] = {
        name: FORMATS[spec.quantization].bank(spec.d_in, spec.d_out, spec.n_primitives, spec.rank)
        for name, spec in layout.banks.items()
    }
    for name, form in layout.neuron_banks.items():
        banks[name] = NeuronBank(form.neurons, form.d_in, form.d_out, form.gated, form.quantization, form.group)
    selections = {
        name: Selection(layout.neuron_banks[spec.bank].neurons, spec.top_k)
        for name, spec in layout.neurons.items()
        if spec.selection == name
    }
    for name in layout.replaced:
        try:
            dense = base.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the layout names {name}, which {type(base).__name__} does not have") from None
        expected = layout.host_shape(name)
        if linear_shape(dense) != expected:
            raise ValueError(f"{name} is {linear_shape(dense)} in the model, {expected} in the layout")
        base.set_submodule(name, _module(layout, name, banks, selections))
    setattr(base, BANKS, _tree(banks))
    for name, kind, place in layout.additions():
        add(banks[place] if place in banks else base.get_submodule(place), name, kind)
    install_int8(model, layout.rest)
    label_parts(model)
    no_split = getattr(base, "_no_split_modules", None)
    if no_split is not None:  # device_map="auto" must keep a bank on one device
        base._no_split_modules = [*no_split, *sorted({type(bank).__name__ for bank in banks.values()})]
    return model


def _tree(banks: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Return the banks as a tree of modules: `band0.up` is `up` in `band0`."""
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
    return tree


def _module(layout: Layout, name: str, banks: Mapping[str, Any], selections: Mapping[str, Selection]) -> nn.Module:
    host_shape = layout.host_shape(name)
    if name in layout.neurons:
        one = layout.neurons[name]
        return NeuronLinear(
            banks[one.bank],
            one.role,
            selections.get(one.selection),
            owns=one.selection == name,
            scaled=one.scaled,
            bias=one.bias,
            host_shape=host_shape,
        )
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
        if isinstance(module, Matrix) and not name.startswith(f"{BANKS}."):
            yield name, module


def neuron_projections(model: Host) -> Iterator[tuple[str, NeuronLinear]]:
    """Yield every projection of a PILON model that uses a bank of neurons, by module name below the base model."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, NeuronLinear):
            yield name, module


def neuron_banks(model: Host) -> Iterator[tuple[str, NeuronBank]]:
    """Yield every bank of neurons of a PILON model by its layout name (`band0`)."""
    for name, bank in model.base_model.named_modules():
        if isinstance(bank, NeuronBank):
            yield name.removeprefix(f"{BANKS}."), bank


def neuron_blocks(model: Host) -> Iterator[dict[str, NeuronLinear]]:
    """Yield, by role, the projections of every block whose neurons come from a bank, in layer order."""
    block: dict[str, NeuronLinear] = {}
    for _, layer in neuron_projections(model):
        if layer.role in block:
            yield block
            block = {}
        block[layer.role] = layer
    if block:
        yield block


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
    homes = {id(bank): name for name, bank in neuron_banks(model)}
    owners = {id(one.selection): name for name, one in neuron_projections(model) if one.owns}
    neurons = {
        name: NeuronSpec(
            homes[id(one.bank)], one.role, one.top_k, one.bias_of_dense, owners.get(id(one.selection), ""), one.scaled
        )
        for name, one in neuron_projections(model)
    }
    stores = {
        name: NeuronBankSpec(b.neurons, b.d_in, b.d_out, b.gated, b.format, b.group) for name, b in neuron_banks(model)
    }
    layers = [*projections(model), *dense_matrices(model), *neuron_projections(model)]
    host = {name: layer.host_shape for name, layer in layers if layer.host_shape != linear_shape(layer)}
    layout = Layout(specs, composed, matrices, host, installed(model), {}, stores, neurons)
    for name, research, kind in ((name, *one) for name, module in (*banks(model), *layers) for one in added(module)):
        layout = layout.with_addition(research, kind, [name])
    return layout
