"""Fields of `research.original` in a training recipe; all off by default (docs/log.md has what each costs or gains)."""

from collections.abc import Iterator
from typing import Literal

from pydantic import model_validator

from pilon_compress.config.reading import Above, Number, Positive, Section, Share, Switch
from pilon_compress.config.research import ResearchSection
from pilon_compress.config.training import TrainRecipe


class Selection(Section):
    """Selection of primitives in a model that is trained from scratch. Not for softmax compositions."""

    explore: Literal["none", "anneal", "noise", "gumbel"] = "none"
    """none: a balanced choice made at the start. anneal: all, then fewer and fewer. noise, gumbel: the top k of scores
    that are disturbed less and less, with a straight-through gradient."""
    until: Share = 0.4
    """Share of the training after which the choice is final."""
    temperature: Above = 1.0
    """Temperature of the disturbance at the start."""


class Staged(Section):
    """The original PILON's schedules."""

    phases: list[Share] = []
    """Ends of the phases, as shares of the training: [0.2, 0.5, 1.0] is the original's."""
    banks: list[Number] = []
    """Factor on the banks' learning rate in each phase; 0 freezes them."""
    compositions: list[Number] = []
    """Factor on the compositions' learning rate in each phase."""
    base: list[Number] = []
    """Factor on everything else's."""
    top_k: list[Positive] = []
    """Primitives that a layer selects at the ends of the phases; softmax and explored selections only. As in the next
    two, the first value holds from the start, it moves in straight lines between ends, and ends at the model's own."""
    rank: list[Positive] = []
    """Components of each primitive in use at the ends of the phases."""
    n_primitives: list[Positive] = []
    """Primitives of each bank in use at the ends of the phases; softmax and explored selections only."""
    unfreeze: list[Share] = []
    """Share of the training at which each band, first to last, begins to learn: its banks and compositions."""
    cache_top_k: Positive = 1
    """Steps for which a softmax selection is kept."""
    entropy: Number = 0.0
    """Weight of the mean entropy of compositions, which it raises: it keeps them from collapsing."""
    diversity: Number = 0.0
    """Weight of the mean cosine between the compositions of a band's layers, which it lowers."""

    @model_validator(mode="after")
    def _one_each(self) -> "Staged":
        for name in ("banks", "compositions", "base", "top_k", "rank", "n_primitives"):
            given = getattr(self, name)
            if given and len(given) != len(self.phases):
                raise ValueError(f"{name} has {len(given)} entries for {len(self.phases)} phases")
        if self.phases != sorted(self.phases) or (self.phases and self.phases[-1] != 1):
            raise ValueError("phases must grow, and end at 1")
        return self


class Settings(ResearchSection):
    """The original PILON's training: schedules, and selections that explore."""

    latent_scale: Switch = False
    """From scratch: a scale per component of rank, shared by all primitives of a bank."""
    latent_bias: Switch = False
    """From scratch: a bias per component of rank, shared by all primitives of a bank."""
    staged: Staged = Staged()
    selection: Selection = Selection()

    def conflicts(self, recipe: TrainRecipe) -> Iterator[tuple[str, str]]:
        """Yield fields that have no effect in `recipe`, with the reason."""
        asked = {"selection.explore": self.selection.explore != "none"}
        asked |= {"latent_scale": self.latent_scale, "latent_bias": self.latent_bias}
        if recipe.task != "pretrain":
            yield from (
                (field, "is for models from scratch (task pretrain)") for field, given in asked.items() if given
            )
        if self.selection.explore == "none":
            for name in ("until", "temperature"):
                if getattr(self.selection, name) != Selection.model_fields[name].default:
                    yield f"selection.{name}", "has no effect with selection.explore none: leave out one of the two"

    def marks(self) -> list[tuple[float, str]]:
        """Return shares of the training, with labels, to mark in plots."""
        found = [(end, f"phase {index + 2}") for index, end in enumerate(self.staged.phases[:-1])]
        if self.selection.explore != "none" and 0 < self.selection.until < 1:
            found.append((self.selection.until, "choice final"))
        return found
