"""What a training recipe may say. It is told from a conversion's recipe by its field `task`."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pilon_compress.config import reading, strict_yaml
from pilon_compress.config.ratio import Parts, Ratio
from pilon_compress.config.reading import Above, Count, Number, Positive, Section, Share, Switch, Text
from pilon_compress.config.research import Research
from pilon_compress.config.strict_yaml import Document

Task = Literal["pretrain", "heal", "sft"]
WEIGHT_DECAY_ENDS = 0.5  # share of a ternary training, as in the second stage of BitNet b1.58 (Ma et al., 2024)


class Host(Section):
    """The shape of a model that is trained from scratch, in the words of its transformers config."""

    family: Literal["arcee", "llama"] = "arcee"
    """arcee: RMSNorm, RoPE, ungated feed-forward. llama: the same with a gated one (SwiGLU)."""
    hidden_size: Positive = 512
    num_hidden_layers: Positive = 8
    num_attention_heads: Positive = 8
    num_key_value_heads: Positive | None = None
    """Default: as many as attention heads."""
    intermediate_size: Positive = 2048
    hidden_act: Text | None = None
    """Default: the family's, relu2 for arcee and silu for llama."""
    vocab_size: Positive = 50257
    tie_word_embeddings: Switch = True
    tokenizer: Text = "openai-community/gpt2"
    """Hub id, folder or package:NAME; or bpe: a byte-level BPE of vocab_size trained on the data."""


class Ffn(Section):
    """What the feed-forward projections are made of."""

    kind: Literal["pilon", "lowrank", "dense"] = "pilon"
    """lowrank: every layer has factors of its own, the control. dense: the baseline."""
    ffn_ratio: Annotated[Ratio, Field(gt=0, le=1)] = 0.5
    """Stored FFN parameters over dense."""
    mac_ratio: Annotated[Ratio, Field(gt=0, le=1)] = 0.5
    """FFN MACs per token over dense."""
    neurons: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Inner width over the host's: the budget stays, so fewer neurons have higher ranks."""
    matrices: Switch = False
    """Keep plain matrices of as many neurons as the budget pays for, in place of primitives."""
    bands: Positive | list[list[int]] | None = None
    """Bands of layers that share banks: their number, or the layers of each. Default: about three layers each."""
    rank: Positive | None = None
    """Rank of each primitive. Default: the largest of 64, 32, 16, ... that spends the budget well."""
    n_primitives: Positive | None = None
    """Per bank; by default what ffn_ratio pays for."""
    top_k: Positive | None = None
    """Primitives that a layer selects; by default what mac_ratio pays for."""
    composition: Literal["component", "scalar", "softmax"] = "component"
    """Weights of a composition: one per component, one per primitive, or softmax over logits (the original's)."""
    dense_until: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    """kind pilon, without matrices: share of the training during which the model is dense; it is then converted to this
    budget, and goes on (Pufferfish, Wang et al., 2021, does so with private factors)."""
    dense_after: Above = 0.67
    """Factor on the learning rate from then on."""
    like: Text | None = None
    """A converted model: train its layout and host from random weights instead, with its tokenizer, as a control."""


class Ternary(Section):
    """Digits -1, 0 and 1 for the numbers of banks and kept matrices, 8-bit codes for what they are multiplied with."""

    enabled: Switch = False
    group: Count = 128
    """Inputs of down projections that share a scale; 0: all of a token's."""
    after: Share = 0.25
    """heal: share of the tokens that heals factors as they are, before they become digits."""


class Data(Section):
    """The text."""

    source: Text | None = None
    """hub:REPO:CONFIG:SPLIT:COLUMN, a txt / jsonl / parquet file or glob, stdlib; chat data for sft."""
    validation: Text | None = None
    """Default: one document in five of the source, by a hash of its text, which is then not trained on."""
    sequence_length: Positive = 1024
    respect_documents: Switch = False
    """Documents that share a sequence do not see each other."""
    chat_template: Text | None = None
    """File with a Jinja template, for a tokenizer that has none (sft)."""
    streaming: Switch = False
    """Tokenise while training, for sources that are too large to store."""
    validation_sequences: Positive = 64
    """Sequences of the fixed slice that is judged by."""


class Optimizer(Section):
    """How parameters move."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: matrices and primitives by orthogonalised momentum, the rest by AdamW."""
    learning_rate: Above = 1e-3
    """Default for healing: 1e-2, relative; encoders want less, 3e-3."""
    relative: Switch = False
    """Learning rates of AdamW count in shares of each tensor's root mean square. Healing does so unless told not to."""
    muon_learning_rate: Above = 5e-3
    """Muon's steps are as large as AdamW's at the same rate. Thin factors fail at 2e-2 (docs/log.md)."""
    banks: Number = 1.0
    """Factor on the learning rate of banks."""
    compositions: Number = 1.0
    embeddings: Number = 1.0
    weight_decay: Number = 0.1
    """On matrices and banks only."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    clip: Above | None = 1.0
    """Largest norm of the gradient."""
    ema: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = None
    """Decay of a moving average of the weights, which is then what is judged and saved."""


class Schedule(Section):
    """How long, and how the learning rate moves."""

    tokens: Positive | None = None
    """Tokens to train on; default: one pass over the source."""
    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd: warm-up, stable, linear decay."""
    warmup: Share = 0.02
    decay: Share = 0.3
    """Share of the training that the decay of wsd takes."""
    floor: Share = 0.0
    """Learning rate at the end, of the highest."""


class Distill(Section):
    """What a healing model learns from its teacher. Weights of the terms; 0 leaves one out."""

    kl: Number = 1.0
    """KL(teacher ‖ student), the mean over tokens, times the square of the temperature."""
    temperature: Above = 1.0
    next_token: Number = 0.0
    """Cross-entropy of the text itself."""
    hidden: Number | None = None
    """Squared error of every layer's states over the teacher's variance. Default: 0; 1 for encoders."""
    ffn: Number = 0.0
    """The same of what the feed-forward blocks put out."""
    pooled: Number = 1.0
    """Encoders: 1 - cosine of the pooled embeddings."""
    match_until: Share = 1.0
    """Share of the training after which hidden and ffn have faded to nothing."""
    layerwise: Share = 0.0
    """Share of the training that fits layer by layer, before the model as a whole."""
    cache_teacher: Count = 0
    """Largest logits of the teacher that are kept on disk for each token, so that it runs once; 0: no cache."""
    keep_best: Switch = True
    """End with the weights that were best on the validation text."""


class Run(Section):
    """How the work is done."""

    batch_size: Positive = 32
    """Sequences per optimiser step, all processes together."""
    micro_batch_size: Positive | None = None
    """Sequences per forward pass and process; default: as many as are a process's share."""
    train: Literal["all", "ffn", "compositions"] = "all"
    """Which parameters learn."""
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    """auto: bfloat16 on GPUs."""
    compile: Switch = False
    gradient_checkpointing: Switch = False
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several processes (torchrun). auto: ddp."""
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: Positive | None = None
    """Steps; default: twenty times in all."""
    checkpoint_every: Above = 600
    """Seconds, at least, between checkpoints."""
    keep: Positive = 2
    """Checkpoints to keep."""
    sample: Text | None = None
    """Prompt for a sample of text at every evaluation."""
    spike: Above | None = 3.0
    """Stop where the loss exceeds its running mean by so many nats, or is not finite."""
    track: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """Where metrics go besides metrics.jsonl."""


HEALING: dict[str, dict[str, Any]] = {
    "optimizer": {"relative": True, "learning_rate": 1e-2, "weight_decay": 0.0, "betas": [0.9, 0.99]},
    "schedule": {"kind": "cosine"},
}
"""What healing takes for granted where nothing is said (docs/results/training.md has what was tried)."""


class TrainRecipe(Section):
    """Everything that decides a training run."""

    MOVED: ClassVar[dict[str, str]] = {
        "staged": "research.original.staged",
        "selection": "research.original.selection",
        "ffn.latent_scale": "research.original.latent_scale",
        "ffn.latent_bias": "research.original.latent_bias",
        "ternary.sub_norm": "research.bitnet.sub_norm",
        "ternary.warmup": "research.bitnet.warmup",
        "ternary.second": "research.bitnet.second",
        "ternary.second_rate": "research.bitnet.second_rate",
    }

    task: Task
    """pretrain: from scratch. heal: a converted model learns from its dense teacher. sft: chat data."""
    start: Text | None = None
    """The model to heal or fine-tune: PILON or dense."""
    teacher: Text | None = None
    """The dense model that is followed; default: the one that `start` was converted from."""
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    shrink: Parts = []
    """heal: convert `start`, a dense model, to the first of these ratios of stored FFN parameters, heal it, convert
    what came of it to the next, and so on; the tokens are shared out evenly."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the saved weights; auto: as `start`, or float32. Ternary ones are float32: rounding would move digits, and
    `export` can narrow the rest."""
    device: Text = "auto"
    host: Host = Host()
    ffn: Ffn = Ffn()
    ternary: Ternary = Ternary()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    distill: Distill = Distill()
    run: Run = Run()
    research: Research = Research()
    """Research modules by name, with their own fields: `original` (the original PILON's training), `bitnet`."""

    @model_validator(mode="before")
    @classmethod
    def _healing(cls, data: Any) -> Any:
        """Healing has defaults of its own; they are written into recipes like anything else that is not a default."""
        if not isinstance(data, dict) or data.get("task") != "heal":
            return data
        filled = dict(data)
        for section, defaults in HEALING.items():
            given = filled.get(section, {})
            if isinstance(given, dict):
                filled[section] = {**defaults, **given}
        return filled

    @property
    def weight_decay_ends(self) -> float:
        """Share of the steps after which weight decay is off: 1 unless the training is ternary."""
        asked = [section.weight_decay_ends for section in self.research.sections.values()]
        return next((end for end in asked if end is not None), WEIGHT_DECAY_ENDS) if self.ternary.enabled else 1.0

    @property
    def warm(self) -> bool:
        """Whether training begins with a dense model."""
        asked = self.ffn
        return self.task == "pretrain" and asked.kind == "pilon" and not asked.matrices and asked.dense_until > 0

    @model_validator(mode="after")
    def _start_fits_task(self) -> "TrainRecipe":
        if self.task != "pretrain" and self.start is None:
            raise ValueError(f"task {self.task} needs `start`, the model to begin with")
        if self.task == "pretrain" and self.start is not None:
            raise ValueError("task pretrain begins from scratch: leave `start` out, or heal or sft that model")
        if self.warm and (self.schedule.tokens is None or self.schedule.kind == "cosine"):
            raise ValueError("ffn.dense_until needs schedule.tokens, and a schedule that is wsd or constant")
        if self.shrink and (self.task != "heal" or self.shrink != sorted(set(self.shrink), reverse=True)):
            raise ValueError("shrink is for task heal, and its ratios must fall")
        asked = self.distill
        if asked.cache_teacher and (asked.hidden or asked.ffn or asked.layerwise):
            raise ValueError("cache_teacher keeps predictions only: leave it out, or hidden, ffn and layerwise at 0")
        if asked.cache_teacher and self.data.streaming:
            raise ValueError("distill.cache_teacher needs text that is stored: leave data.streaming out")
        if asked.layerwise and self.run.compile or asked.ffn and self.run.compile:
            raise ValueError("run.compile does not go with distill.ffn or layerwise, which look into blocks")
        if self.task == "sft" and self.ternary.enabled:
            raise ValueError("ternary.enabled is for pretrain and heal: a ternary model is taught chats as it is")
        self.research.check(self)
        return self


def load(name_or_path: str, overrides: Sequence[str] = ()) -> TrainRecipe:
    """Read the bundled recipe of that name, else the YAML file at that path, and apply `overrides`, each "a.b=value".

    Raises BadInput as `pilon_compress.config.conversion.load` does.
    """
    return reading.load(TrainRecipe, name_or_path, overrides, "convert")


def build(data: Mapping[str, Any], overrides: Sequence[str] = (), origin: str = "command line") -> TrainRecipe:
    """A recipe from nested dictionaries and `overrides`. `origin` begins the messages of BadInput."""
    return reading.checked(TrainRecipe, Document(origin, data), overrides)


def dump(recipe: TrainRecipe) -> str:
    """YAML that `load` turns back into an equal recipe: what differs from the defaults."""
    shown = {"task": recipe.task, "seed": recipe.seed} | json.loads(recipe.model_dump_json(exclude_defaults=True))
    return strict_yaml.dump({field: shown[field] for field in TrainRecipe.model_fields if field in shown})


def schema() -> dict[str, Any]:
    """JSON schema of a training recipe, for editors: the contents of recipes/train.schema.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TrainRecipe.model_json_schema()}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
