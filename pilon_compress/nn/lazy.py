"""Cache values that a module computes from its tensors, until a tensor is replaced or written to."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class LazyValue(Generic[Value]):
    """A value made of tensors when it is first asked for, and again once one of them was replaced or written to.

    Copies, such as copies of a module have, begin without one. Compilers, which know no addresses, get what is there.
    """

    def __init__(self) -> None:
        self.value: Value | None = None
        self._marks: list[tuple[int, int]] = []
        self._kept: list[Tensor] = []  # as long as the tensors live nothing else has their addresses

    def get(self, tensors: Sequence[Tensor], make: Callable[[], Value]) -> Value:
        """Return the value of `make`, computed again if one of `tensors` was replaced or written to."""
        if torch.compiler.is_compiling():
            return make() if self.value is None else self.value
        marks = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        if self.value is None or marks != self._marks:
            self.value, self._marks = make(), marks
            self._kept = [tensor.detach() for tensor in tensors]
        return self.value

    def __deepcopy__(self, memo: dict[int, Any]) -> "LazyValue[Value]":
        return LazyValue()

    def __reduce__(self) -> tuple[type["LazyValue[Value]"], tuple[()]]:
        return LazyValue, ()
