"""Sections of a training recipe: text, optimiser, schedule, distillation and the run itself."""

from typing import Annotated, Literal

from pydantic import Field

from pilon_compress.config.fields import SOURCES
from pilon_compress.config.option import Option
from pilon_compress.config.ratio import Ratio
from pilon_compress.config.reading import Above, Count, Number, Positive, Section, Share, Switch, Text
from pilon_compress.config.tiers import TierOfTraining

WHAT = "What is trained"


class TrainingText(Section):
    """The text to train on."""

    source: Annotated[Text | None, Option("--data", metavar="SOURCE", tail=SOURCES)] = None
    """Text to train on: a source such as hub:REPO:CONFIG:SPLIT:COLUMN, a file, or a glob; with task sft a file of
    chats, which must be named. Default: WikiText-2 for causal LMs, stdlib for encoders."""


class Sequences(Section):
    """Sequences of the text, and the text to validate on."""

    validation: Annotated[Text | None, Option(metavar="SOURCE")] = None
    """Text to validate on, named in the same way. Default: one document in five of `source`, chosen by a hash of its
    text, and not trained on."""
    sequence_length: Annotated[Positive, Option()] = 1024
    """Tokens per sequence."""
    respect_documents: Switch = False
    """Keep documents that share a sequence from attending to each other."""
    chat_template: Annotated[Text | None, Option(metavar="FILE")] = None
    """File with a Jinja chat template, for a tokenizer that has none (task sft). Default: the tokenizer's template."""
    streaming: Switch = False
    """Tokenise while training, for sources that are too large to store."""
    validation_sequences: Positive = 64
    """Sequences of the fixed slice of the validation text that is evaluated."""


class Data(Sequences, TrainingText):
    """The text to train on, and to validate on."""


class Rate(Section):
    """The learning rate."""

    learning_rate: Annotated[Above, Option()] = 1e-3
    """Highest learning rate of the schedule. Healing takes 1e-2 unless told otherwise, relative to each tensor's root
    mean square; encoders want less, 3e-3."""


class OptimizerConfig(Section):
    """The optimiser, and learning rates beside the main one."""

    name: Literal["adamw", "muon"] = "adamw"
    """Optimiser: adamw, or muon (orthogonalised momentum for matrices and primitives, AdamW for the rest)."""
    relative: Switch = False
    """Count learning rates of AdamW in shares of each tensor's root mean square. Healing does so by default."""
    muon_learning_rate: Above = 5e-3
    """Learning rate of muon, whose steps are as large as AdamW's at the same rate. Thin factors fail at 2e-2
    (docs/log.md)."""
    banks: Number = 1.0
    """Factor on the learning rate of banks."""
    compositions: Number = 1.0
    """Factor on the learning rate of compositions."""
    routers: Number = 1.0
    """Factor on the learning rate of the routers of experts."""
    embeddings: Number = 1.0
    """Factor on the learning rate of embeddings."""
    weight_decay: Number = 0.1
    """Weight decay of matrices and banks."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moment."""
    clip: Above | None = 1.0
    """Largest norm of the gradient; longer ones are scaled down."""


class Optimizer(OptimizerConfig, Rate):
    """Optimiser and learning rates."""


class Length(Section):
    """Length of the training."""

    tokens: Annotated[Positive | None, Option()] = None
    """Tokens to train on. Default: one pass over the text."""


class ScheduleConfig(Section):
    """Course of the learning rate."""

    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    """Course of the learning rate: wsd (warm-up, stable, linear decay), cosine or constant."""
    warmup: Share = 0.02
    """Share of the training that the warm-up takes."""
    decay: Share = 0.3
    """Share of the training that the decay of wsd takes."""
    floor: Share = 0.0
    """Learning rate at the end, as a share of the highest."""


class Schedule(ScheduleConfig, Length):
    """Length of the training, and course of the learning rate."""


class Distill(Section):
    """Loss of a healing model against its teacher: weights of the terms, of which 0 leaves one out."""

    kl: Number = 1.0
    """Weight of KL(teacher ‖ student), the mean over tokens times the square of the temperature."""
    temperature: Annotated[Above, Option()] = 1.0
    """Distillation temperature."""
    next_token: Number = 0.0
    """Weight of the cross-entropy of the text itself."""
    hidden: Number | None = None
    """Weight of the squared error of every layer's states over the teacher's variance. Default: 0, or 1 for
    encoders."""
    pooled: Number = 1.0
    """Weight of 1 - cosine of the pooled embeddings (encoders)."""
    match_until: Share = 1.0
    """Share of the training after which the weight of `hidden` has fallen to 0."""
    cache_teacher: Annotated[Count, Option()] = 0
    """Cache this many of the teacher's largest log-probabilities per token on disk, so that it runs once; 0: no
    cache."""
    keep_best: Switch = True
    """End with the weights that were best on the validation text, not with the last ones."""


class ExitGates(Section):
    """Gates that let tokens skip feed-forward blocks, trained after everything else; the weights do not change."""

    enabled: Switch = False
    """End with the training of exit gates. Task gates, which does nothing else, has no need of it."""
    max_perplexity_increase: Annotated[Ratio, Field(gt=0, le=1), Option()] = 0.01
    """Perplexity that skipping may cost on the validation text, as a share of the model's own, as in 1%."""
    tokens: Positive = 2**15
    """Tokens of the training text that the price of skipping a block is estimated on."""
    substitute: Count | None = None
    """Rank of the linear map that answers in a skipped block's place; 0: a constant alone. Default: an eighth of the
    hidden size."""


class Run(Section):
    """Batches, precision, processes, checkpoints and metrics."""

    batch_size: Annotated[Positive, Option()] = 32
    """Sequences per optimiser step, over all processes."""
    micro_batch_size: Positive | None = None
    """Sequences per forward pass and process. Default: all of a process's share."""
    train: Annotated[Literal["all", "ffn", "compositions"], Option("--learn", panel=WHAT)] = "all"
    """Parameters that learn: all, those of the feed-forward blocks (ffn; of attention, too, where it was converted), or
    compositions alone."""
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    """Precision of the computation: bfloat16 or none; auto takes bfloat16 on GPUs."""
    compile: Switch = False
    """Compile the model with torch.compile."""
    gradient_checkpointing: Switch = False
    """Recompute activations in the backward pass, to save memory."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Data parallelism of several processes (torchrun): ddp, or fsdp, which shards the weights; auto takes ddp."""
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: Positive | None = None
    """Steps between evaluations. Default: twenty evaluations in all."""
    checkpoint_every: Above = 600
    """Shortest time between checkpoints, in seconds."""
    keep: Positive = 2
    """Checkpoints to keep."""
    sample: Text | None = None
    """Prompt that the model continues at every evaluation. Default: none."""
    spike: Above | None = 3.0
    """Abort if the loss exceeds its running mean by more than this (nats), or is not finite."""
    tier: Annotated[TierOfTraining | None, Option(metavar="FIELD=VALUE,...")] = None
    """Tiers: hold a share of each bank's primitives in memory, with gradients and optimiser states, as in n_hot=0.25;
    the others rest in files and take part in the computation, but do not learn until they are promoted (docs/tiers.md).
    Default: none."""
    track: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """Trackers that metrics go to besides metrics.jsonl."""
