"""Bands: the consecutive layers that share a bank."""

from pilon_compress.errors import BadInput

LAYERS_PER_BAND = 3  # the best of those tried for sharing (docs/results/conversion.md)


def split_bands(layers: list[int], bands: int | list[list[int]] | None) -> list[list[int]]:
    """Contiguous bands of nearly equal size, or the given ones, checked to cover each converted layer once."""
    if isinstance(bands, list):
        named = sorted(layer for band in bands for layer in band)
        if named != layers:
            raise BadInput(f"the bands name layers {named}, but the layers are {layers}")
        return bands
    count = bands if bands is not None else -(-len(layers) // LAYERS_PER_BAND)
    if not 1 <= count <= len(layers):
        raise BadInput(f"{count} bands do not fit {len(layers)} layers")
    edges = [round(i * len(layers) / count) for i in range(count + 1)]
    return [layers[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def trial_bands(layers: list[int], bands: int | list[list[int]] | None) -> list[list[int]]:
    """Return the bands that may share: the given ones, else pairs and bands of about LAYERS_PER_BAND, to choose from.

    Longer bands share more, but all layers of a band keep as many neurons as each other.
    """
    if bands is not None or len(layers) < 2:
        return split_bands(layers, bands)
    found = [*split_bands(layers, None), *split_bands(layers, len(layers) // 2)]
    return [band for place, band in enumerate(found) if band not in found[:place]]
