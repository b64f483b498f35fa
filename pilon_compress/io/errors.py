"""Exceptions that libraries raise for files which they cannot read: one table for all that open a model."""

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from pilon_compress.errors import BadInput

UNREADABLE = (
    OSError,
    ValueError,  # JSON and UTF-8 errors are ValueErrors
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    ArithmeticError,
    AssertionError,
    RuntimeError,  # RecursionError among them
    MemoryError,  # a declared size that no memory holds
    SafetensorError,
    StrictDataclassError,
)
"""For `except`, behind `except BadInput: raise`, which is a ValueError that needs no other words."""


def unreadable(error: BaseException) -> bool:
    """True for anything that a library raises because of a file's contents; tokenizers raises plain `Exception`."""
    return not isinstance(error, BadInput) and (isinstance(error, UNREADABLE) or type(error) is Exception)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that is not blank; its type where it has no words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
