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
