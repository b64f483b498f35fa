"""Build models with random weights: a base architecture of transformers, its feed-forward projections replaced.

    Ffn (recipe)   ->  layout_for(sites, ffn)  ->  install in the base architecture  ->  initialise

The dense twin is the base architecture without the replacement.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from pilon_compress.config.model import FfnConfig, HostConfig, TernaryConfig
from pilon_compress.errors import BadInput
from pilon_compress.io.messages import note
from pilon_compress.kernels.gpu_layout import MULTIPLE
from pilon_compress.models import checkpoint
from pilon_compress.models.architectures.registry import ARCHITECTURES
from pilon_compress.models.families import Site
from pilon_compress.nn.bands import split_bands
from pilon_compress.nn.init import initialise
from pilon_compress.nn.layout import Layout, install
from pilon_compress.nn.size import ffn_size
from pilon_compress.nn.sizing import BankBudget, size_bank, size_private
from pilon_compress.nn.specs import BankSpec, DenseSpec, ProjectionSpec
from pilon_compress.nn.stored import stored_layout

EOS = "<eos>"
NOTED = 0.1  # of the budget's numbers: more is not left unspent without a word


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens, the first of which is EOS (and padding)."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=EOS)


def config_for(host: HostConfig, sequence_length: int, eos: int | None) -> PretrainedConfig:
    """Return the config of a base architecture for sequences of `sequence_length` tokens; `eos` is also its BOS id.

    Raises BadInput for an architecture that nobody registered, for a hidden size that the attention heads do not
    divide, and for heads that the key-value heads do not.
    """
    if host.hidden_size % host.num_attention_heads:
        raise BadInput(
            f"hidden_size {host.hidden_size} is no multiple of num_attention_heads {host.num_attention_heads}"
        )
    heads = host.num_key_value_heads or host.num_attention_heads
    if host.num_attention_heads % heads:
        raise BadInput(f"num_attention_heads {host.num_attention_heads} is no multiple of num_key_value_heads {heads}")
    architecture = ARCHITECTURES[host.family]
    act = {"hidden_act": host.hidden_act} if host.hidden_act else {}
    config = architecture.config(
        hidden_size=host.hidden_size,
        num_hidden_layers=host.num_hidden_layers,
        num_attention_heads=host.num_attention_heads,
        num_key_value_heads=heads,
        intermediate_size=host.intermediate_size,
        vocab_size=host.vocab_size,
        tie_word_embeddings=host.tie_word_embeddings,
        max_position_embeddings=sequence_length,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=None,
        **act,
    )
    config.architectures = [architecture.class_name]
    return config


def build_with(config: PretrainedConfig, layout: Layout | None, seed: int) -> PreTrainedModel:
    """Return a model of any architecture and layout with random weights, float32, CPU; dense where `layout` is None."""
    torch.manual_seed(seed)
    model = checkpoint.build(config)
    if layout is not None:
        install(model, layout)
        generator = torch.Generator().manual_seed(seed)
        initialise(model, getattr(config, "initializer_range", 0.02), generator)
        balance_selection(model, layout)
    return model.float().train()


def layout_in(config: PretrainedConfig) -> Layout | None:
    """Return the layout in a PILON model's config; None for a dense model. Raises BadInput for a damaged layout."""
    return stored_layout(config)


def layout_for(sites: Sequence[Site], ffn: FfnConfig, ternary: TernaryConfig = TernaryConfig()) -> Layout | None:  # noqa: B008
    """Return banks and projections of at most `ffn_ratio` of the sites' parameters and `mac_ratio` of their MACs.

    lowrank: one primitive for each projection. dense: the matrices unchanged, None if they are not ternary either.
    Raises BadInput where the budget is too small for one primitive or for the shape that `ffn` gives, and for bands
    that do not partition the layers.
    """
    if ffn.kind == "dense" and not ffn.matrices:
        if not ternary.enabled:
            return None
        layout = dense_layout(sites)
    else:
        layout = _narrowed(sites, ffn) if ffn.matrices else _composed(sites, ffn, MULTIPLE if ternary.enabled else 1)
        if ternary.enabled and not ffn.matrices:
            _note_waste(layout, _composed(sites, ffn, 1))
        check_limits(layout, ffn)
    return with_ternary(layout, sites, ternary)


def _note_waste(layout: Layout, free: Layout) -> None:
    """Say how much of the budget `layout`, of ranks that suit the kernels, leaves, where `free` ranks leave less."""
    found, other = (ffn_size(one).over_dense().stored_ratio for one in (layout, free))
    if found < (1 - NOTED) * other:
        ranks = sorted({bank.rank for bank in free.banks.values()})
        note(
            f"ranks are multiples of {MULTIPLE}, which ternary kernels need not pad: {found:.2f} of the dense numbers "
            f"are stored; --set ffn.rank={ranks[-1]} would store {other:.2f}"
        )


def check_limits(layout: Layout, ffn: FfnConfig) -> None:
    """Raise BadInput where the shape that `ffn` gives exceeds its budget.

    Primitives that no layer can select do not count: a selection may explore them, and training ends without them.
    """
    banks = dict(layout.banks)
    for name, bank in banks.items():
        users = [layout.projections[user] for user in layout.users(name)]
        if users[0].composition != "softmax":
            banks[name] = replace(bank, n_primitives=min(bank.n_primitives, sum(user.top_k for user in users)))
    size = ffn_size(replace(layout, banks=banks))
    stored, macs = size.stored / size.dense_stored, size.macs / size.dense_macs
    if stored > ffn.ffn_ratio * (1 + 1e-9):
        raise BadInput(
            f"the model stores {stored:.3g} of the dense FFN's numbers, above ffn.ffn_ratio {ffn.ffn_ratio:g}: "
            "lower ffn.rank, ffn.n_primitives or ffn.top_k, or raise ffn.ffn_ratio"
        )
    if macs > ffn.mac_ratio * (1 + 1e-9):
        raise BadInput(
            f"the model takes {macs:.3g} of the dense FFN's MACs, above ffn.mac_ratio {ffn.mac_ratio:g}: "
            "lower ffn.top_k or ffn.rank, or raise ffn.mac_ratio"
        )


def dense_layout(sites: Sequence[Site]) -> Layout:
    """Return the layout that keeps every projection a dense matrix of its own size."""
    return Layout({}, {}, {site.name: DenseSpec(site.d_in, site.d_out, site.bias) for site in sites})


def with_ternary(layout: Layout, sites: Sequence[Site], ternary: TernaryConfig) -> Layout:
    """Return `layout` with ternary weights, where `ternary` enables them."""
    down = [site.name for site in sites if site.role == "down"]
    return layout.ternary(down, ternary.group) if ternary.enabled else layout


def _composed(sites: Sequence[Site], ffn: FfnConfig, multiple: int) -> Layout:
    """Return a layout of banks that the layers of a band share, or one bank for each layer (lowrank).

    Ranks that `ffn` leaves open are multiples of `multiple`, where the budget pays for one.
    """
    wide = _widened(sites, ffn.neurons)
    layers = sorted({site.layer for site in sites})
    bands = [[layer] for layer in layers] if ffn.kind == "lowrank" else split_bands(layers, ffn.bands)
    banks: dict[str, BankSpec] = {}
    projections: dict[str, ProjectionSpec] = {}
    for index, band in enumerate(bands):
        for role in dict.fromkeys(site.role for site in wide):
            members = [site for site in wide if site.role == role and site.layer in band]
            dense = [site for site in sites if site.role == role and site.layer in band]
            bank, top_k = _size(members, dense, ffn, multiple)
            name = f"band{index}.{role}"
            banks[name] = bank
            composition = "component" if ffn.kind == "lowrank" else ffn.composition
            projections |= {site.name: ProjectionSpec(name, top_k, site.bias, composition) for site in members}
    host = {d.name: (d.d_in, d.d_out) for d, w in zip(sites, wide, strict=True) if d != w}
    return Layout(banks, projections, {}, host)


def _widened(sites: Sequence[Site], neurons: float) -> list[Site]:
    """Return the sites with the inner width times `neurons`, rounded to a multiple of 16."""
    if neurons == 1:
        return list(sites)

    def sized(width: int) -> int:
        return max(16, round(neurons * width / 16) * 16)

    return [
        replace(site, d_in=sized(site.d_in)) if site.role == "down" else replace(site, d_out=sized(site.d_out))
        for site in sites
    ]


def _narrowed(sites: Sequence[Site], ffn: FfnConfig) -> Layout:
    """Return a layout of dense matrices with fewer neurons, as in a small dense model."""
    down = next(site for site in sites if site.role == "down")
    width = int(min(ffn.ffn_ratio, ffn.mac_ratio) * down.d_in)
    width = width // 16 * 16 or width
    if width < 1:
        raise BadInput(f"ffn_ratio {ffn.ffn_ratio:g} is too small for one neuron: raise ffn_ratio or mac_ratio")
    narrow = [replace(s, d_in=width) if s.role == "down" else replace(s, d_out=width) for s in sites]
    matrices = {site.name: DenseSpec(site.d_in, site.d_out, site.bias) for site in narrow}
    return Layout({}, {}, matrices, {site.name: (site.d_in, site.d_out) for site in sites})


def _size(members: Sequence[Site], dense: Sequence[Site], ffn: FfnConfig, multiple: int) -> tuple[BankSpec, int]:
    """Return the bank of one band and role, and the number of its primitives that a layer selects."""
    site = members[0]
    pair = site.d_in + site.d_out
    budget = BankBudget(
        layers=len(members),
        pair=pair,
        full_rank=min(site.d_in, site.d_out),
        stored=ffn.ffn_ratio * sum(one.parameters for one in dense) - sum(one.d_out for one in members if one.bias),
        components=min(int(ffn.mac_ratio * dense[0].d_in * dense[0].d_out / pair), site.d_in, site.d_out),
        composition="component" if ffn.kind == "lowrank" else ffn.composition,
    )
    if ffn.kind == "lowrank":
        size = size_private(budget, multiple)
        if size is None:
            raise BadInput(f"the budget pays for no rank in the {site.role} projections: raise ffn_ratio or mac_ratio")
        return BankSpec(site.d_in, site.d_out, 1, size.rank), 1
    size = size_bank(budget, ffn.n_primitives, ffn.rank, ffn.top_k, multiple=multiple)
    if size is None:
        raise BadInput(f"the budget pays for no primitive in the {site.role} projections: raise ffn_ratio or mac_ratio")
    spec = BankSpec(site.d_in, site.d_out, size.n_primitives, size.rank)
    return spec, size.top_k


@torch.no_grad()
def balance_selection(model: PreTrainedModel, layout: Layout) -> None:
    """Select primitives in turn: the first k for the first layer of a band, the next k for the second, and so on.

    The number of layers that use a primitive then differs by at most one between primitives.
    """
    users: dict[str, int] = {}
    for name, spec in layout.projections.items():
        composed = model.base_model.get_submodule(name)
        turn = users.get(spec.bank, 0)
        users[spec.bank] = turn + 1
        if spec.composition != "softmax":
            n = layout.banks[spec.bank].n_primitives
            places = (turn * spec.top_k + torch.arange(spec.top_k)) % n
            composed.selected.copy_(places.sort().values)
