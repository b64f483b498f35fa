"""Count the work that tokens skip at exit gates while a model runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pilon_compress.nn.exits import gated_blocks
from pilon_compress.nn.installed import layout_of
from pilon_compress.nn.size import block_macs


class SkipCount:
    """Tokens that skipped each block: `take` after every forward pass says which tokens of it count."""

    def __init__(self, work: dict[str, int]) -> None:
        self.work, self.tokens = work, 0
        self.skips = dict.fromkeys(work, 0)
        self.last: dict[str, Tensor] = {}

    def take(self, counted: Tensor) -> None:
        """Count the decisions of the last forward pass for tokens where `counted` (B, T) is True."""
        self.tokens += int(counted.sum())
        for name, skip in self.last.items():
            self.skips[name] += int((skip.reshape(counted.shape) & counted.to(skip.device)).sum())
        self.last.clear()

    @property
    def by_layer(self) -> list[float]:
        """Share of the counted tokens that skipped each block, in layer order."""
        return [count / max(1, self.tokens) for count in self.skips.values()]

    @property
    def share(self) -> float:
        """Share of all blocks' MACs that were skipped."""
        shares = zip(self.by_layer, self.work.values(), strict=True)
        return sum(share * macs for share, macs in shares) / max(1, sum(self.work.values()))

    def figures(self) -> dict[str, Any]:
        """Return the fields of an evaluation about exit gates; {} of a model without gates."""
        return {"skipped": self.share, "skipped_by_layer": self.by_layer} if self.work else {}


@contextmanager
def counting(model: Any) -> Iterator[SkipCount]:
    """Yield a count of what tokens skip in `model` inside the context; blocks without a gate count as computed."""
    layout = layout_of(model)
    count = SkipCount({name: block_macs(layout, name) for name in layout.exits})

    def note(name: str) -> Any:
        def hook(gate: nn.Module, args: Any, skip: Tensor) -> None:
            count.last[name] = skip.detach()

        return hook

    hooks = [block.exit_gate.register_forward_hook(note(name)) for name, block in gated_blocks(model)]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()
