"""Give a block of the dense model another forward pass, without another name for any of its parts."""

from torch import nn

_MADE: dict[tuple[type, type], type] = {}  # by the block's own class and the mixin


def extend(block: nn.Module, mixin: type) -> None:
    """Let `block` answer as `mixin` does, whose `super()` is the block's own class.

    Names of parameters stay, so a checkpoint's do, too; FSDP2 changes classes in the same way, and the two combine.
    """
    own = type(block)
    if (own, mixin) not in _MADE:
        _MADE[own, mixin] = type(f"{mixin.__name__}{own.__name__}", (mixin, own), {"__module__": mixin.__module__})
    block.__class__ = _MADE[own, mixin]


def retract(block: nn.Module, mixin: type) -> None:
    """Undo `extend`. Raises ValueError for a block that was not extended by `mixin`, or by another mixin after it."""
    first, *rest = type(block).__bases__
    if first is not mixin:
        raise ValueError(f"{type(block).__name__} is no block whose last extension is {mixin.__name__}")
    block.__class__ = rest[0]
