"""Result of an export."""

from typing import Any

from pydantic import SerializeAsAny

from pilon_compress.results.base import Result
from pilon_compress.results.sizes import Replaced, Sizes


class Exported(Replaced):
    """Figures that an exporter measured, or None. An exporter with other figures returns a subclass."""

    ffn: Sizes | None = None
    """The feed-forward projections, bytes as on disk."""
    model: Sizes | None = None
    """The whole model."""
    max_logit_difference: float | None = None
    """Largest difference of outputs on random tokens, in float32, to the model before."""
    rest: str | None = None
    """Number format that attention, head and embeddings were rounded to."""
    rest_relative_error: float | None = None
    """Norm of the difference by rounding attention, head and embeddings, over the outputs' norm."""
    remarks: list[str] = []
    """Sentences for a reader: what was written, and by what it was verified."""


class ExportResult(Result):
    """A folder that was exported."""

    source: str
    """The PILON model."""
    output: str
    to: str
    """The form: dense, self-contained, packed, or that of another exporter."""
    load: str
    """The expression that loads it."""
    figures: SerializeAsAny[Exported]

    def dump(self) -> dict[str, Any]:
        """The figures as plain data, beside the rest; `model` is the source, unless the whole model was measured."""
        about = {"model": self.source, "output": self.output, "to": self.to, "load": self.load}
        return {**about, **self.figures.dump()}
