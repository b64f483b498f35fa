"""The section `budget` of a conversion's recipe: the size of the result."""

from typing import Annotated, Any, Literal

from pydantic import field_validator, model_validator

from pilon_compress.config.conflicts import refuse_field
from pilon_compress.config.option import Option
from pilon_compress.config.ratio import Part, SizeRatio
from pilon_compress.config.reading import Positive, Section, Switch

DEFAULT_RATIO = 0.5
LARGEST_RATIO = 4.0  # with allow_larger: enough for a full-rank plan of any shape
SHAPE = ("n_primitives", "rank", "top_k")


def with_default(data: dict[str, Any], targets: Any, experts: bool = False) -> dict[str, Any]:
    """Return the fields of a budget with a ratio where nothing else decides the size: `ratio` where `targets` names
    other projections than the feed-forward ones; 1 for `experts` that are slices."""
    fixed = None not in (data.get("n_primitives"), data.get("rank"))
    fixed = fixed and data.get("optimize") != "compute"  # whose limit on MACs is the ratio
    if fixed or data.get("ffn_ratio") is not None or data.get("ratio") is not None:
        return data
    name = "ratio" if targets and targets != ["ffn"] else "ffn_ratio"
    return {**data, name: 1.0 if experts else DEFAULT_RATIO}


class Budget(Section):
    """The size of the result."""

    ffn_ratio: Annotated[SizeRatio | None, Option(metavar="RATIO")] = None
    """Largest ratio of stored FFN parameters, PILON over dense: a number above 0 and at most 1, as in 0.5, 50% or 1/2,
    or a preset: minimal 0.9, baseline 0.75, mild 0.6, moderate 0.5, aggressive 0.25, extreme 0.1. Default: 0.5, or what
    `n_primitives` and `rank` come to if both are given."""
    ratio: Annotated[SizeRatio | None, Option(metavar="RATIO")] = None
    """Largest ratio of the stored parameters of everything that `targets` names, PILON over dense: in the place of
    `ffn_ratio`, which counts feed-forward parameters alone, where attention is replaced, too. Default, for other
    targets than ffn: 0.5."""
    allow_larger: Annotated[Switch, Option()] = False
    """Permit a plan that is larger than the dense model, for tests and study: the ratio may be up to 4."""
    optimize: Annotated[Literal["storage", "compute"], Option()] = "storage"
    """Size to limit. With storage MACs may be up to the dense model's; with compute the ratio of MACs is at most that
    of stored parameters."""
    mac_ratio: Annotated[Part | None, Option(metavar="RATIO")] = None
    """Largest ratio of MACs per token of what is replaced, PILON over dense: above 0 and at most 1. Not together with
    `optimize` compute. Default: as `optimize` says; an eighth above the stored ratio for shared whole neurons."""
    neurons: Switch = True
    """Prune neurons of feed-forward blocks and refit the others. If false, all neurons stay: only ranks are lowered."""
    whole_matrices: Annotated[Switch, Option()] = False
    """Drop neurons alone and keep every matrix whole, which is what other runtimes load: see `export --list`."""
    uniform_width: Annotated[Switch, Option()] = False
    """Leave the same number of neurons in every layer, as the configs of stock models have it (`export --to native`);
    matrices stay whole. It costs quality: layers differ in what they can spare."""
    multiple_of: Annotated[Positive | None, Option(metavar="N", also={"budget.whole_matrices": True})] = None
    """Make the number of neurons of each layer a multiple of this, all matrices whole: 32 suits llama.cpp's q4_0 and
    q8_0, 256 its k-quants. Default: 8 in large blocks, else any number."""
    share: Annotated[Literal["none", "auto", "always"], Option()] = "none"
    """Bands of layers that share banks of primitives: none; with auto those where the measured loss of the model falls
    on text that no fit has seen; with always every band. A shared bank costs MACs, up to `mac_ratio` (which always
    spends), and saves stored numbers; trying costs two to three times the time. Attention never shares."""
    primitive: Annotated[Literal["factors", "neurons"], Option()] = "factors"
    """Primitives that bands share: low-rank factors of each projection, or whole neurons (their columns of gate and up,
    their row of down), for which every layer has scales and a bias of its own; neurons ask for `share` always."""
    bands: Annotated[Positive | list[list[int]] | None, Option(metavar="BANDS")] = None
    """Bands of layers that share banks: their number, or the layers of each, as in [[0, 1], [2, 3]]; asks for `share`
    always where that is not set. Default: bands of about three layers; whole neurons: pairs, or more if needed."""
    n_primitives: Annotated[Positive | None, Option()] = None
    """Primitives per bank. Default: as many as `ffn_ratio` pays for."""
    rank: Annotated[Positive | None, Option()] = None
    """Rank of each primitive. Default: the rank that spends `ffn_ratio` best."""
    rank_multiple: Annotated[Positive | None, Option()] = None
    """Make ranks multiples of this, where the budget pays for one: 16 suits the ternary kernels, which pad others.
    Conversions within a ternary training do so. Default: 8 in large blocks, else any rank."""
    top_k: Annotated[Positive | None, Option()] = None
    """Primitives that each layer selects from its bank. Default: as many as cost no more MACs than the dense layer."""

    @model_validator(mode="before")
    @classmethod
    def _default_ratio(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return with_default(data, data.get("targets"), data.get("moe") is not None)

    @model_validator(mode="after")
    def _in_range(self) -> "Budget":
        if self.ratio is not None and self.ffn_ratio is not None:
            refuse_field(
                "ratio", "and budget.ffn_ratio are two sizes of one result: leave out one of the two", self.ratio
            )
        limit = LARGEST_RATIO if self.allow_larger else 1
        if self.limits_storage and not 0 < self.stored_limit <= limit:
            words = f"at most {limit:g}" + (
                "" if self.allow_larger else ", the dense size, without budget.allow_larger"
            )
            refuse_field(self.ratio_name, f"must be above 0 and {words}", self.stored_limit)
        return self

    @field_validator("bands", mode="before")
    @classmethod
    def _bands(cls, value: Any) -> Any:
        def count(x: Any) -> bool:
            return isinstance(x, int) and not isinstance(x, bool) and x >= 0

        def band(x: Any) -> bool:
            return isinstance(x, list) and bool(x) and all(map(count, x))

        lists = isinstance(value, list) and bool(value) and all(map(band, value))
        if value is None or lists or (count(value) and value > 0):
            return value
        raise ValueError("must be a number of bands, or the layers of each band, as in [[0, 1], [2, 3]]")

    @property
    def sharing(self) -> str:
        """Return none, auto or always: `share`, or what `bands` and `primitive` ask for."""
        named = self.bands is not None or self.primitive == "neurons"
        asked = "always" if named and "share" not in self.model_fields_set else self.share
        return "none" if self.fixed_shape else asked

    @property
    def whole(self) -> bool:
        """Return True if neurons alone are dropped."""
        return self.whole_matrices or self.uniform_width

    @property
    def limits_storage(self) -> bool:
        """True if a ratio bounds what is stored; False where n_primitives and rank alone decide."""
        return self.ffn_ratio is not None or self.ratio is not None

    @property
    def mac_limit(self) -> float | None:
        """Upper bound of the MACs per token over dense; None where storage alone counts."""
        if self.mac_ratio is not None:
            return self.mac_ratio
        return min(1.0, self.stored_limit) if self.optimize == "compute" else None

    @property
    def stored_limit(self) -> float:
        """Largest ratio of stored parameters of everything that is replaced, PILON over dense."""
        return next((one for one in (self.ratio, self.ffn_ratio) if one is not None), DEFAULT_RATIO)

    @property
    def ratio_name(self) -> str:
        """Return the name of the field that has the ratio."""
        return "ffn_ratio" if self.ratio is None else "ratio"

    @property
    def fixed_shape(self) -> list[str]:
        """Return the fields that fix the shape of banks."""
        return [name for name in SHAPE if getattr(self, name) is not None]
