"""Sharded tensors of a training on several processes."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
