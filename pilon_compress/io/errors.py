"""List the exceptions that libraries raise for files that they cannot read, for all code that opens a model."""

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
"""For `except` after `except BadInput: raise`, since BadInput is a ValueError whose message is final."""


def unreadable(error: BaseException) -> bool:
    """Return True if a library raised `error` because of a file's contents; tokenizers raises plain `Exception`."""
    return not isinstance(error, BadInput) and (isinstance(error, UNREADABLE) or type(error) is Exception)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message that is not blank, or the name of its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
