"""Sections of a training recipe that describe the model: base architecture, feed-forward part, ternary weights."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from pilon_compress.config.experts import Experts
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


class ExpertsOf(Section):
    """Experts, in a model from scratch or in one that is healed."""

    moe: Annotated[Experts | None, Option(metavar="FIELD=VALUE,...")] = None
    """Experts: each block holds several recipes over the bank of its band, of which a router chooses for every token,
    as in experts=8,top_k=2; more fields in docs/moe.md. From scratch `mac_ratio` is that of the active ones; with task
    heal the blocks of the converted model get experts, which begin as its static compositions. Default: none."""


class FfnConfig(ExpertsOf):
    """Form of the feed-forward projections of a model that is trained from scratch."""

    kind: Annotated[Literal["pilon", "lowrank", "dense"], Option("--ffn")] = "pilon"
    """Form of the feed-forward projections from scratch: pilon, lowrank (the control: every layer has factors of its
    own) or dense (the baseline)."""
    primitive: Annotated[Literal["factors", "neurons"], Option()] = "factors"
    """Primitives of a PILON model from scratch: factors (low-rank products, which compose each projection) or neurons
    (whole ones, with their columns of gate and up and their row of down: each layer selects some)."""
    share: Annotated[Literal["none", "auto", "always"], Option()] = "auto"
    """Let the layers of a band share primitives: none (each layer has its own), always (layers share, and the model has
    both ratios to within 0.01 or is refused), or auto (where `mac_ratio` is above `ffn_ratio`, as far as that
    can be spent)."""
    ffn_ratio: Annotated[Part, Option()] = 0.5
    """Largest ratio of stored FFN parameters over dense."""
    mac_ratio: Annotated[Part | None, Option()] = None
    """Largest ratio of FFN MACs per token over dense. Default: `ffn_ratio`, and twice that where `share` is always."""
    scales: Switch = True
    """Give each layer scales and a bias of its own for the neurons that it selects. Without them, layers that use all
    neurons of their band are plain blocks with tied weights. For `primitive` neurons."""
    neurons: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Inner width over the base architecture's. The budget stays, so fewer neurons have higher ranks."""
    bands: Positive | list[list[int]] | None = None
    """Bands of layers that share banks: their number, or the layers of each. Default: about three layers each, or as
    many layers as `mac_ratio` takes where they share."""
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
    (Pufferfish, Wang et al., 2021, does so with private factors). For `kind` pilon and `primitive` factors."""
    dense_after: Above = 0.67
    """Factor on the learning rate after the dense share of the training."""
    like: Annotated[Text | None, Option(metavar="MODEL", also={"task": "pretrain"})] = None
    """Converted model whose layout, base architecture and tokenizer a control run takes, from random initial weights.
    Default: none."""

    @property
    def macs(self) -> float:
        """The ratio of MACs to plan with."""
        if self.mac_ratio is not None:
            return self.mac_ratio
        return min(1.0, 2 * self.ffn_ratio) if self.share == "always" else self.ffn_ratio

    @property
    def shares(self) -> bool:
        """True if MACs beyond the stored numbers are spent on primitives that layers share."""
        fixed = self.n_primitives is not None or self.top_k is not None
        more = self.share == "auto" and self.macs > self.ffn_ratio and not fixed and self.composition != "softmax"
        more = more and self.moe is None  # experts share the bank whatever the ratios
        return self.kind == "pilon" and (self.share == "always" or more)


def ffn_conflicts(ffn: FfnConfig) -> Iterator[tuple[str, str]]:
    """Yield (dotted field, what is wrong) for what does not go with experts, or sharing that is asked for by name."""
    if ffn.moe is not None and ffn.kind == "pilon":
        if ffn.share == "always":
            yield (
                "ffn.moe",
                "shares its bank among experts as the ratios have it: leave out one, this or ffn.share always",
            )
        if ffn.composition == "softmax":
            yield "ffn.moe", "needs ffn.composition component or scalar"
        if ffn.dense_until and ffn.primitive == "factors":
            yield "ffn.moe", "begins from scratch, not with a conversion: set ffn.dense_until to 0"
        return
    if ffn.kind != "pilon" or ffn.share != "always":
        return
    if ffn.primitive == "factors":
        if ffn.dense_until:
            yield "ffn.dense_until", "ends in a conversion, which need not share as ffn.share always asks: set it to 0"
        for name in ("n_primitives", "top_k"):
            if getattr(ffn, name) is not None:
                yield f"ffn.{name}", "follows from the ratios with ffn.share always: leave out one of the two"
    if ffn.macs <= ffn.ffn_ratio:
        field = "ffn.mac_ratio" if ffn.mac_ratio is not None else "ffn.ffn_ratio"
        yield field, "leaves no MACs for sharing: with ffn.share always ffn.mac_ratio must be above ffn.ffn_ratio"


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
