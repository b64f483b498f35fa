"""Fields of `research.bitnet` in a training recipe; all off by default (figures: docs/results/ternary.md)."""

from collections.abc import Iterator

from pilon_compress.config.reading import Number, Share, Switch
from pilon_compress.config.research import ResearchSection
from pilon_compress.config.training import WEIGHT_DECAY_ENDS, TrainRecipe


class Settings(ResearchSection):
    """Options of BitNet's training."""

    sub_norm: Switch = False
    """From scratch: RMSNorm before the down projections; with or without ternary weights."""
    warmup: Share = 0.0
    """With ternary.enabled: share of the steps in which rounding takes hold little by little."""
    second: Share = WEIGHT_DECAY_ENDS
    """With ternary.enabled: share of the steps after which the second stage begins, without weight decay, and with
    learning rates times second_rate."""
    second_rate: Number = 1.0

    @property
    def weight_decay_ends(self) -> float:
        """Return the share of the training at which weight decay ends."""
        return self.second

    def conflicts(self, recipe: TrainRecipe) -> Iterator[tuple[str, str]]:
        """Yield fields that have no effect in `recipe`, with the reason."""
        if self.sub_norm and (recipe.task != "pretrain" or recipe.warm):
            yield "sub_norm", "is for models from scratch, with ffn.dense_until 0: no conversion has it"
        if not recipe.ternary.enabled:
            defaults = {name: type(self).model_fields[name].default for name in ("warmup", "second", "second_rate")}
            for name, default in defaults.items():
                if getattr(self, name) != default:
                    yield name, "has no effect with ternary.enabled false: leave out one of the two"
