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
