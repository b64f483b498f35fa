"""Give a block of the dense model another forward pass, without another name for any of its parts."""

from functools import cache

from torch import nn


def extend(block: nn.Module, mixin: type) -> None:
    """Let `block` answer as `mixin` does, whose `super()` is the block's own class.

    Names of parameters stay, so a checkpoint's do, too; FSDP2 changes classes in the same way, and the two combine.
    """
    block.__class__ = _extended(type(block), mixin)


@cache
def _extended(own: type, mixin: type) -> type:
    return type(f"{mixin.__name__}{own.__name__}", (mixin, own), {"__module__": mixin.__module__})
