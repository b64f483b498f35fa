"""Forward hooks on modules by name, for as long as a context lasts."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Before = Callable[[nn.Module, tuple[Any, ...]], None]
After = Callable[[nn.Module, tuple[Any, ...], Any], Any]


@contextmanager
def hooked(
    root: nn.Module, before: Iterable[tuple[str, Before]] = (), after: Iterable[tuple[str, After]] = ()
) -> Iterator[None]:
    """Call hooks whenever a named module of `root` runs inside the context.

    `before`: with the module and its arguments. `after`: with its output besides; what it returns takes its place.
    """
    handles = [root.get_submodule(name).register_forward_pre_hook(hook) for name, hook in before]
    handles += [root.get_submodule(name).register_forward_hook(hook) for name, hook in after]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
