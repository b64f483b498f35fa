"""Build models with random weights: a base architecture of transformers, its feed-forward projections replaced.

    Ffn (recipe)   ->  layouts.layout_for(sites, ffn)  ->  install in the base architecture  ->  initialise

The dense twin is the base architecture without the replacement.
"""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from pilon_compress.config.model import HostConfig
from pilon_compress.errors import BadInput
from pilon_compress.models import checkpoint
from pilon_compress.models.architectures.registry import ARCHITECTURES
from pilon_compress.nn.init import initialise
from pilon_compress.nn.install import install
from pilon_compress.nn.installed import neuron_projections, projections
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.neuron_bank import Selection
from pilon_compress.nn.stored import stored_layout

EOS = "<eos>"


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
        balance_neurons(model, torch.Generator().manual_seed(seed))
        balance_experts(model, torch.Generator().manual_seed(seed))
    return model.float().train()


def layout_in(config: PretrainedConfig) -> Layout | None:
    """Return the layout in a PILON model's config; None for a dense model. Raises BadInput for a damaged layout."""
    return stored_layout(config)


@torch.no_grad()
def balance_selection(model: PreTrainedModel, layout: Layout) -> None:
    """Select primitives in turn: the first k for the first layer of a band, the next k for the second, and so on.

    The number of layers that use a primitive then differs by at most one between primitives.
    """
    users: dict[str, int] = {}
    for name, spec in layout.projections.items():
        composed = model.base_model.get_submodule(name)
        if spec.experts > 1 and composed.selected.dim() > 1:  # see `balance_experts`
            continue
        turn = users.get(spec.bank, 0)
        users[spec.bank] = turn + 1
        if spec.composition != "softmax":
            n = layout.banks[spec.bank].n_primitives
            places = (turn * spec.top_k + torch.arange(spec.top_k)) % n
            composed.selected.copy_(places.sort().values)


@torch.no_grad()
def balance_neurons(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Select neurons so that all are used by equally many blocks, to within one: windows that go round the bank.

    Windows begin at equal distances, in random order of the blocks, so that any two of them may overlap.
    """
    blocks: dict[int, list[Selection]] = {}
    for _, layer in neuron_projections(model):
        if layer.owns and layer.selection is not None and layer.selection.experts == 1:
            blocks.setdefault(id(layer.bank), []).append(layer.selection)
    for selections in blocks.values():
        for place, selection in zip(torch.randperm(len(selections), generator=generator), selections, strict=True):
            start = round(int(place) * selection.neurons / len(selections))
            selection.selected.copy_((start + torch.arange(selection.top_k)) % selection.neurons)


@torch.no_grad()
def balance_experts(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Select primitives and neurons of experts at random, so that all are used by equally many, to within one.

    Experts that select disjoint parts of a bank own them: so it is where the bank is as large as all selections.
    """
    uses: dict[int, torch.Tensor] = {}
    layers: list[tuple[int, int, torch.Tensor]] = [
        (id(one.bank), one.bank.n_primitives, one.selected)
        for _, one in projections(model)
        if one.experts > 1 and one.selected.dim() > 1
    ]
    for _, layer in neuron_projections(model):
        if layer.owns and layer.selection is not None and layer.selection.experts > 1:
            layers.append((id(layer.bank), layer.bank.neurons, layer.selection.selected))
    for bank, count, selected in layers:
        used = uses.setdefault(bank, torch.zeros(count))
        for row in selected:
            least = (used + torch.rand(count, generator=generator)).topk(len(row), largest=False).indices
            used[least] += 1
            row.copy_(least.sort().values)
