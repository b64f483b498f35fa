"""How tokens are spread over experts: a part of a training's result."""

from pilon_compress.results.base import Result


class Routing(Result):
    """How a model's routers spread the validation text over its experts."""

    entropy: float
    """Entropy of a router's scores, 0 (one expert has all) to 1; the mean over tokens and blocks."""
    load_cv: float
    """Standard deviation of the experts' load over its mean; the mean over blocks."""
    load_max: float
    """Load of the busiest expert over the mean of its block; the largest of all blocks."""
    similarity: float
    """Mean cosine of two experts of a block: 1 where all are alike."""
    load: dict[str, list[float]]
    """By block, the share of the assignments that each expert gets."""
