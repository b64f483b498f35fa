"""Allocate neurons alone, every matrix whole, as stock formats have it: a width for each layer, or one for all."""

from collections.abc import Sequence
from dataclasses import replace

from pilon_compress.convert.allocate.budget import Allocation, Sizing, allocation_of, dense_size
from pilon_compress.convert.allocate.options import neuron_step, whole_block
from pilon_compress.convert.plan import down_of
from pilon_compress.elastic.knapsack import Option, Pick
from pilon_compress.errors import BadInput
from pilon_compress.models.families import Site


def with_whole_matrices(sizings: Sequence[Sizing], multiple: int | None = None) -> list[Sizing]:
    """Return layers whose options are numbers of neurons alone, multiples of `multiple`.

    Raises BadInput for a layer of which not all projections are replaced: its neurons cannot go.
    """
    return [replace(one, options=_options(one, _widths([one], multiple))) for one in sizings]


def uniform_width(
    sizings: Sequence[Sizing], ratio: float, mac_ratio: float | None = None, multiple: int | None = None
) -> Allocation:
    """Leave the largest number of neurons that is the same in all layers and within both ratios.

    Raises BadInput if no such number is as small as that, and as `with_whole_matrices` does.
    """
    stored, macs = dense_size(sizings)
    widths = _widths(sizings, multiple)
    table = list(zip(*(_options(one, widths) for one in sizings), strict=True))
    for chosen in reversed(table):
        small = sum(one.stored for one in chosen) <= ratio * stored
        if small and (mac_ratio is None or sum(one.macs for one in chosen) <= mac_ratio * macs):
            return allocation_of(sizings, ratio, [Pick((place,), one) for place, one in enumerate(chosen)])
    least = sum(one.stored for one in table[0]) / stored
    raise BadInput(
        f"no width is within the budget: {widths[0]} neurons in every layer are {least:.3g} of the dense FFN. "
        "Raise --ffn-ratio or --mac-ratio, or lower --multiple-of"
    )


def _widths(sizings: Sequence[Sizing], multiple: int | None) -> list[int]:
    """Return the numbers of neurons that are tried, in rising order; the dense one of the narrowest layer is the last.

    A dense width that is no multiple of `multiple` is left out.
    """
    full = min(_down(one).d_in for one in sizings)
    step = multiple or neuron_step(full)
    found = list(range(step, full + 1, step))
    if multiple is None and found[-1:] != [full]:
        found.append(full)
    if not found:
        raise BadInput(f"blocks of {full} neurons have no multiple of {multiple}: lower --multiple-of")
    return found


def _options(sizing: Sizing, widths: Sequence[int]) -> list[Option]:
    """Return the block with each number of neurons, in the order of `widths`."""
    width, elimination = _down(sizing).d_in, sizing.elimination
    assert elimination is not None
    return [whole_block(sizing.sites, width, elimination, sizing.scale, count) for count in widths]


def _down(sizing: Sizing) -> Site:
    """Return the layer's down projection. Raises BadInput where neurons cannot go."""
    down = down_of(sizing.sites)
    if down is None or sizing.elimination is None:
        raise BadInput(
            f"layer {sizing.layer} is not replaced as a whole, so its neurons cannot go: change --targets and "
            "--ignore, or leave out --uniform-width and --whole-matrices"
        )
    return down
