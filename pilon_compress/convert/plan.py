"""The plan of a conversion: every bank with its sizes, and the projections that stay one matrix."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pilon_compress.models.families import Site
from pilon_compress.models.shared_layouts import add_neurons
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.sizing import BankSize, composition_numbers
from pilon_compress.nn.specs import BankSpec, DenseSpec, ProjectionSpec, RouterSpec
from pilon_compress.nn.targets import Target


@dataclass(frozen=True)
class BankPlan:
    """A bank to be fitted: the sites that share it, and its sizes."""

    band: int
    role: str
    sites: tuple[Site, ...]
    n_primitives: int
    rank: int
    top_k: int
    composition: str = "component"
    own: bool = False
    """The bank of one layer in a band of several, whose other banks are shared."""

    @property
    def name(self) -> str:
        """Return the bank's name in the layout."""
        return f"band{self.band}.layer{self.sites[0].layer}.{self.role}" if self.own else f"band{self.band}.{self.role}"

    @property
    def layers(self) -> list[int]:
        """Return the layers of the sites."""
        return [site.layer for site in self.sites]

    @property
    def d_in(self) -> int:
        """Return the number of inputs."""
        return self.sites[0].d_in

    @property
    def d_out(self) -> int:
        """Return the number of outputs."""
        return self.sites[0].d_out

    @property
    def full_rank(self) -> int:
        """Return the largest rank of a projection."""
        return min(self.d_in, self.d_out)

    def stored(self) -> int:
        """Numbers kept: primitives, composition weights, selected indices, biases."""
        per_layer = composition_numbers(self.composition, BankSize(self.n_primitives, self.rank, self.top_k))
        primitives = self.n_primitives * self.rank * (self.d_in + self.d_out)
        return primitives + len(self.sites) * per_layer + self.biases()

    def biases(self) -> int:
        """Return the number of bias values."""
        return sum(self.d_out for site in self.sites if site.bias)

    def dense_stored(self) -> int:
        """Return the parameters of the dense projections."""
        return sum(site.parameters for site in self.sites)

    def macs(self) -> int:
        """Multiply-accumulates per token of all its layers; a composition dearer than its dense matrix is folded."""
        inner = self.top_k * self.rank * (self.d_in + self.d_out)
        return len(self.sites) * min(inner, self.d_in * self.d_out)


@dataclass(frozen=True)
class NeuronBankPlan:
    """A bank of whole neurons to be fitted, and its sizes.

    sites: the projections of the blocks that share it, as in the dense model
    top_k: neurons that each layer uses, in the order of `layers`
    """

    band: int
    sites: tuple[Site, ...]
    neurons: int
    top_k: tuple[int, ...]

    @property
    def name(self) -> str:
        """Return the bank's name in the layout."""
        return f"band{self.band}"

    @property
    def layers(self) -> list[int]:
        """Return the layers that share it."""
        return list(dict.fromkeys(site.layer for site in self.sites))

    @property
    def widths(self) -> dict[int, int]:
        """Return the neurons that each layer uses."""
        return dict(zip(self.layers, self.top_k, strict=True))


@dataclass(frozen=True)
class Plan:
    """The banks, bands and dense matrices of a conversion."""

    ratio: float
    bands: list[list[int]]
    banks: list[BankPlan]
    matrices: list[Site] = field(default_factory=list)
    """Projections that stay one matrix."""
    host: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(d_in, d_out) in the dense model of the projections that lose neurons."""
    neuron_banks: list[NeuronBankPlan] = field(default_factory=list)
    routers: dict[str, RouterSpec] = field(default_factory=dict)
    """By module name of the block: slices of its neurons, each a recipe without scales over the bank of its layer."""

    @property
    def sites(self) -> list[Site]:
        """Return every site that is replaced."""
        found = [site for bank in self.banks for site in bank.sites] + self.matrices
        return found + [site for store in self.neuron_banks for site in store.sites]

    def band_of(self, layer: int) -> int:
        """Return the index of the band of a layer."""
        return next(index for index, band in enumerate(self.bands) if layer in band)

    def layout(self, quantization: str | None = None) -> Layout:
        """Return the layout of the PILON model, in the number format `quantization` if it is given."""
        matrices = {site.name: DenseSpec(site.d_in, site.d_out, site.bias) for site in self.matrices}
        specs = {bank.name: BankSpec(bank.d_in, bank.d_out, bank.n_primitives, bank.rank) for bank in self.banks}
        projections = {
            site.name: ProjectionSpec(bank.name, bank.top_k, site.bias, bank.composition)
            for bank in self.banks
            for site in bank.sites
        }
        made = Layout(specs, projections, matrices, dict(self.host), routers=dict(self.routers))
        for store in self.neuron_banks:
            router = self.routers.get(store.sites[0].name.rpartition(".")[0])
            recipes = 1 if router is None else router.recipes
            add_neurons(made, store.name, store.sites, store.neurons, store.widths, router is None, recipes)
            whole = {site.name: (site.d_in, site.d_out) for site in store.sites}
            made.host.update({name: shape for name, shape in whole.items() if shape != made.shape(name)})
        return made if quantization is None else made.in_format(quantization)


ORDER: tuple[Target, ...] = ("attention", "other", "ffn")
"""Kinds of blocks as a layer computes them."""


def blocks_of(sites: Sequence[Site]) -> dict[Target, list[Site]]:
    """Return the sites of one layer by kind of block, in the order in which the layer computes them."""
    found = {target: [site for site in sites if site.target == target] for target in ORDER}
    return {target: members for target, members in found.items() if members}


def down_of(sites: Sequence[Site]) -> Site | None:
    """The projection that reads the neurons which all others of the layer make; None where neurons cannot be dropped.

    They can where all projections of a block are to be replaced.
    """
    downs = [site for site in sites if site.role == "down"]
    ups = [site for site in sites if site.role in ("up", "gate", "gate_up")]
    if len(downs) != 1 or len(ups) != len(sites) - 1 or {site.name for site in sites} != set(downs[0].block):
        return None
    width = downs[0].d_in
    fused = len(ups) == 1 and ups[0].role == "gate_up" and ups[0].d_out == 2 * width
    plain = any(up.role == "up" for up in ups) and all(up.d_out == width for up in ups)
    return downs[0] if fused or plain else None


def trimmed(site: Site, neurons: int, width: int) -> Site:
    """The site with `neurons` of its block's `width` left."""
    if site.role == "down":
        return replace(site, d_in=neurons)
    return replace(site, d_out=site.d_out // width * neurons)
