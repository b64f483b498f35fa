"""Load a model in tiers: the tensors of its banks stay in the checkpoint's files, but for the hot primitives."""

import re
from collections.abc import Sequence
from pathlib import Path

from pilon_compress.nn.layout import Host
from pilon_compress.tiers.modules import Place, put_in_tiers, to_tier
from pilon_compress.tiers.table import Table, tables_in


class InTiers:
    """A `Loading` that keeps the share `n_hot` of each bank's primitives in memory. Raises BadInput where none goes."""

    def __init__(self, n_hot: float) -> None:
        self.n_hot = n_hot
        self._found: list[Place] = []

    def before(self, model: Host) -> None:
        """Take the banks' tensors off the model, so that they are not read."""
        self._found = to_tier(model, self.n_hot)
        for place in self._found:
            for leaf in place.axes:
                del place.module._parameters[leaf]
        ignored = {f"^{re.escape(name)}$" for name in self._names()}
        model._keys_to_ignore_on_load_unexpected = ignored | set(model._keys_to_ignore_on_load_unexpected or ())

    def after(self, model: Host, files: Sequence[Path]) -> None:
        """Map the banks' tensors, and read hot primitives. Raises ValueError where a file lacks one."""
        tables: dict[str, Table] = {}
        for file in files:
            tables |= tables_in(file, self._names())
        if lost := set(self._names()) - set(tables):
            raise ValueError(f"the checkpoint lacks {len(lost)} PILON tensors, the first is {min(lost)}")
        put_in_tiers(model, self._found, self.n_hot, tables, model.dtype)

    def _names(self) -> list[str]:
        return [f"{place.name}.{leaf}" for place in self._found for leaf in place.axes]
