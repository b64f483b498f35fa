"""The bank of neurons: a primitive is a whole neuron of a feed-forward block, which the layers of a band share.

    in_j, up_j      columns of `gate` and `up` (d, N); a block without a gate has `up` alone
    out_j           rows of `down` (N, d)

    gated           y = Σ  s'_j · act(s_j · x·in_j + b_j) · (x·up_j) · out_j      j: the k selected neurons
    without         y = Σ  s'_j · act(s_j · x·up_j + b_j) · out_j

Scales s, s' and the bias b belong to a neuron and a layer (`nn.neuron_linear`). With k = N and without them the layers
of a band are plain blocks that share their weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pilon_compress.nn.formats.registry import FORMATS
from pilon_compress.nn.lazy import LazyValue
from pilon_compress.nn.part import Chosen, Matrix, Part
from pilon_compress.nn.sharded import full

SLICES = 4  # runs of neurons that are cheaper to read in place than to copy


class Selection(Part, nn.Module):
    """The `top_k` neurons of a bank of `neurons` that one block uses: `selected` (k,), stored once.

    With several `experts` each selects its own: `selected` (E, k). The block's projections call it rather than read
    `selected`, so that offloading can bring it first.
    """

    selected: Tensor

    def __init__(self, neurons: int, top_k: int, experts: int = 1) -> None:
        super().__init__()
        self.neurons, self.top_k, self.experts = neurons, top_k, experts
        each = () if experts == 1 else (experts,)
        self.register_buffer("selected", torch.arange(top_k).expand(*each, top_k).clone())
        self._runs: LazyValue[list[tuple[tuple[int, int], ...]]] = LazyValue()

    def forward(self, expert: int | None = 0) -> Chosen:
        """Return the selection, that of one `expert`, with its runs of consecutive neurons if they are few.

        None: the first neuron of every expert.
        """
        if expert is None:
            return Chosen(self.selected.view(self.experts, self.top_k)[:, 0])
        selected = self.selected if self.experts == 1 else self.selected[expert]
        if torch.compiler.is_compiling() or self.selected.is_meta:
            return Chosen(selected, ())
        return Chosen(selected, self._runs.get((self.selected,), self._find_runs)[expert])

    def _find_runs(self) -> list[tuple[tuple[int, int], ...]]:
        return [self._runs_of(row) for row in self.selected.view(self.experts, self.top_k).cpu()]

    @staticmethod
    def _runs_of(selected: Tensor) -> tuple[tuple[int, int], ...]:
        """(start, end) of each run of consecutive neurons, in the order of `selected`; () if there are many."""
        cuts = ((selected.diff() != 1).nonzero()[:, 0] + 1).tolist()
        if len(cuts) >= SLICES:
            return ()
        edges = [0, *cuts, len(selected)]
        return tuple((int(selected[a]), int(selected[b - 1]) + 1) for a, b in zip(edges, edges[1:], strict=False))

    def refuse(self) -> str | None:
        """Return why the loaded selection is damaged, or None."""
        low, high = self.selected.aminmax()
        if low < 0 or high >= self.neurons:
            return f"selects neurons that are not among the {self.neurons} of its bank"
        rows = self.selected.view(self.experts, self.top_k).sort(1).values
        return "selects a neuron twice" if bool((rows.diff(dim=1) == 0).any()) else None

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        return f"{self.top_k} of {self.neurons}" + (f", experts={self.experts}" if self.experts > 1 else "")


class NeuronBank(Part, nn.Module):
    """`neurons` whole neurons for one band: the matrices `up` and, if `gated`, `gate` (d_in, N), and `down` (N, d_out).

    The matrices are those of the number format `format`. The bank is owned once by the model; layers call it and do not
    read its tensors, so that FSDP can gather them first. `group`: inputs of `down` that share a scale of a quantiser.
    """

    up: Matrix
    down: Matrix

    def __init__(self, neurons: int, d_in: int, d_out: int, gated: bool, format: str = "none", group: int = 0) -> None:
        super().__init__()
        self.neurons, self.d_in, self.d_out, self.gated = neurons, d_in, d_out, gated
        self.format, self.group = format, group
        for role, (rows, columns) in self.shapes().items():
            own = group if role == "down" else 0
            self.add_module(role, FORMATS[format].matrix(rows, columns, False, (rows, columns), own))

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of the bank's matrices by role."""
        enter = {role: (self.d_in, self.neurons) for role in (("gate", "up") if self.gated else ("up",))}
        return {**enter, "down": (self.neurons, self.d_out)}

    def matrix(self, role: str) -> Matrix:
        """Return the matrix of that role, over all neurons."""
        found = self.get_submodule(role)
        assert isinstance(found, Matrix)
        return found

    def matrices(self) -> Iterator[tuple[str, Matrix]]:
        """Yield the matrices by role."""
        return ((role, self.matrix(role)) for role in self.shapes())

    def become(self, format: str, matrices: Mapping[str, nn.Module]) -> None:
        """Take `matrices` by role, of another number format, in the place of the bank's."""
        self.format = format
        for role, matrix in matrices.items():
            self.add_module(role, matrix)

    @property
    def folds(self) -> bool:
        """Return True if plain matrices compute the same as the bank's: not so of integer products."""
        return all(matrix.folds for _, matrix in self.matrices())

    def forward(
        self, x: Tensor, role: str, chosen: Chosen | None = None, segments: Sequence[tuple[Chosen, int, int]] = ()
    ) -> Tensor:
        """Multiply `x` (..., d) with the matrix of that role, of the `chosen` neurons; None: of all of them.

        With `segments`, (chosen, start, end), each of those rows of `x` (N, d) with neurons of its own.
        """
        matrix = self.get_submodule(role)
        if segments:
            return torch.cat([matrix(x[start:end], one, role == "down") for one, start, end in segments])
        y: Tensor = matrix(x, chosen, role == "down")
        return y

    def part(self, role: str, chosen: Chosen | None = None) -> Tensor:
        """Return the matrix of that role as it counts, (d_in, k) or (k, d_out), of the `chosen` neurons."""
        matrix = self.matrix(role).matrix()
        return matrix if chosen is None else matrix.index_select(0 if role == "down" else 1, chosen.indices)

    @property
    def down_weight(self) -> Tensor:
        """Return the weight of `down` (d_out, N): of banks of floats."""
        weight: Any = self.get_submodule("down").weight
        return weight  # type: ignore[no-any-return]

    def sizes(self) -> Tensor:
        """‖in‖ · ‖out‖ of every neuron (N,), whole on every process: of banks that train."""
        enter: Any = self.get_submodule("gate" if self.gated else "up").weight
        return full(enter.detach()).norm(dim=1) * full(self.down_weight.detach()).norm(dim=0)

    @torch.no_grad()
    def draw(self, std: float, generator: torch.Generator | None) -> None:
        """Fill the matrices, in place, with N(0, std²)."""
        for _, matrix in self.matrices():
            matrix.draw(std, generator)

    @torch.no_grad()
    def fill(self, matrices: Mapping[str, Tensor], codes: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
        """Copy `matrices` by role, (d_in, N) and (N, d_out), into the bank; `codes` by role where they were rounded."""
        for role, matrix in self.matrices():
            FORMATS[self.format].fill_matrix(matrix, matrices[role], None if codes is None else codes[role])

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        return f"neurons={self.neurons}, d_in={self.d_in}, d_out={self.d_out}, gated={self.gated}, {self.format}"
