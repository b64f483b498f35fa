"""Results of a benchmark against another runtime."""

from pilon_compress.results.base import Result

OneOrEach = float | dict[str, float]
"""A ratio; by type of the other runtime's file where several were asked for."""


class RuntimeFigures(Result):
    """Figures of one runtime, a value for each repeat; repeats of equal place in both ran right after each other."""

    decode: list[float]
    """Seconds for each further token."""
    read128: list[float] | None = None
    """Seconds in which 128 tokens are read, up to the first token that is written."""
    read512: list[float] | None = None
    first_token: list[float]
    """Seconds from the start of a new process to its first token."""
    memory: list[int]
    """Bytes: largest resident memory of that process."""
    file: int
    """Bytes of the files that it reads."""
    text: str
    """Greedy continuation of the prompt, to see that the model writes sense."""


class Against(Result):
    """Ratios, theirs ÷ ours, of times and bytes: above 1 ours is better. Median of the repeats."""

    runtime: str
    version: str
    dense: str
    """The dense model that theirs runs."""
    types: list[str]
    decode: OneOrEach
    read128: OneOrEach | None = None
    read512: OneOrEach | None = None
    first_token: OneOrEach
    memory: OneOrEach
    file: OneOrEach
    spread: dict[str, list[float] | dict[str, list[float]]]
    """By figure: lowest and highest ratio of the repeats; by type where several were asked for."""
    starts: int
    """New processes of each side, besides the first, which is not counted."""
    ours: RuntimeFigures
    theirs: dict[str, RuntimeFigures]
    """By type."""
