"""Sections of a training recipe that describe the model: base architecture, feed-forward part, ternary weights."""

from typing import Annotated, Literal

from pydantic import Field

from pilon_compress.config.option import Option
from pilon_compress.config.ratio import Part
from pilon_compress.config.reading import Above, Count, Positive, Section, Share, Switch, Text


class HostConfig(Section):
    """The shape of a model that is trained from scratch, in the words of its transformers config."""

    family: Text = "arcee"
    """Base architecture: arcee (RMSNorm, RoPE, ungated feed-forward), llama (the same with a gated one, SwiGLU), or
    another that is registered."""
    hidden_size: Positive = 512
    """Width of the hidden states."""
    num_hidden_layers: Positive = 8
    """Transformer layers."""
    num_attention_heads: Positive = 8
    """Attention heads per layer."""
    num_key_value_heads: Positive | None = None
    """Heads of keys and values per layer. Default: as many as attention heads."""
    intermediate_size: Positive = 2048
    """Inner width of the feed-forward blocks: their neurons."""
    hidden_act: Text | None = None
    """Activation of the feed-forward blocks. Default: the family's, relu2 for arcee and silu for llama."""
    vocab_size: Positive = 50257
    """Rows of the token embedding."""
    tie_word_embeddings: Switch = True
    """Use the token embedding as the output head, too."""
    tokenizer: Text = "openai-community/gpt2"
    """Tokenizer: hub id, folder or package:NAME; or bpe, a byte-level BPE of `vocab_size` trained on the data."""


class FfnConfig(Section):
    """Form of the feed-forward projections of a model that is trained from scratch."""

    kind: Annotated[Literal["pilon", "lowrank", "dense"], Option("--ffn")] = "pilon"
    """Form of the feed-forward projections from scratch: pilon, lowrank (the control: every layer has factors of its
    own) or dense (the baseline)."""
    ffn_ratio: Part = 0.5
    """Largest ratio of stored FFN parameters over dense."""
    mac_ratio: Part = 0.5
    """Largest ratio of FFN MACs per token over dense."""
    neurons: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Inner width over the base architecture's. The budget stays, so fewer neurons have higher ranks."""
    matrices: Switch = False
    """Use narrower dense feed-forward blocks of the same budget in place of primitives (a control)."""
    bands: Positive | list[list[int]] | None = None
    """Bands of layers that share banks: their number, or the layers of each. Default: about three layers each."""
    rank: Positive | None = None
    """Rank of each primitive. Default: the largest of 64, 32, 16, ... that spends the budget well."""
    n_primitives: Positive | None = None
    """Primitives per bank. Default: as many as `ffn_ratio` pays for."""
    top_k: Positive | None = None
    """Primitives that a layer selects. Default: as many as `mac_ratio` pays for."""
    composition: Literal["component", "scalar", "softmax"] = "component"
    """Weights of a composition: one per component, one per primitive, or softmax over logits (the original's)."""
    dense_until: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    """Share of the training during which the model is dense; it is then converted to this budget and trained on
    (Pufferfish, Wang et al., 2021, does so with private factors). For `kind` pilon, without `matrices`."""
    dense_after: Above = 0.67
    """Factor on the learning rate after the dense share of the training."""
    like: Annotated[Text | None, Option(metavar="MODEL", also={"task": "pretrain"})] = None
    """Converted model whose layout, base architecture and tokenizer a control run takes, from random initial weights.
    Default: none."""


class TernaryConfig(Section):
    """Ternary weights (-1, 0, 1 times a scale) in banks and dense matrices, with activations quantised to 8 bits."""

    enabled: Annotated[Switch, Option("--ternary")] = False
    """Train ternary feed-forward weights; with --heal after a first share of the tokens, `ternary.after`."""
    group: Count = 128
    """Inputs of down projections that share a scale; with 0 all of a token's inputs share one."""
    after: Share = 0.25
    """Share of the tokens that heals the factors before they become ternary (task heal)."""
    blocks: Share = 0.0
    """Share of the tokens as text on which the ternary blocks are fitted, one after another, to the teacher's states
    behind the ternary blocks before them, before the whole model learns (task heal)."""
    scales: Share = 0.0
    """Share of the tokens, the last one, in which ternary weights stay and the compositions' scales alone learn (task
    heal)."""

    @property
    def staged(self) -> bool:
        """True if healing to ternary weights has more stages than one, the whole model's, or another one alone."""
        return bool(self.after or self.blocks or self.scales)
