"""Describe the parts of a layout: every bank with its projections, every dense matrix, their sizes."""

from collections.abc import Sequence
from typing import Any

from pilon_compress.models.families import Site
from pilon_compress.nn.formats.registry import FORMATS
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.size import Size, bank_size, dense_size, neuron_size, router_size
from pilon_compress.results.sizes import Part


def layout_parts(layout: Layout, sites: Sequence[Site], itemsize: int) -> list[Part]:
    """Return an entry for each bank, dense matrix and router, sorted by first layer and role.

    itemsize: bytes per float
    """
    parts = []
    by_name = {site.name: site for site in sites}
    for name, spec in layout.banks.items():
        users = [by_name[user] for user in layout.users(name) if user in by_name]
        if users:
            user = layout.projections[users[0].name]
            shape: dict[str, Any] = {"n_primitives": spec.n_primitives, "rank": spec.rank, "top_k": user.top_k}
            shape["composition"] = user.composition
            parts.append(_part(layout, users, bank_size(layout, name, itemsize), spec.quantization, itemsize, shape))
    for name, matrix in layout.matrices.items():
        if name in by_name:
            shape = dict.fromkeys(("n_primitives", "rank", "top_k", "composition"))
            size = dense_size(layout, name, itemsize)
            parts.append(_part(layout, [by_name[name]], size, matrix.quantization, itemsize, shape))
    for name, store in layout.neuron_banks.items():
        users = [by_name[user] for user in layout.users(name) if user in by_name]
        if users:
            top_k = max(layout.neurons[user.name].top_k for user in users)
            shape = {"n_primitives": store.neurons, "rank": 1, "top_k": top_k, "composition": "neurons"}
            size = neuron_size(layout, name, itemsize)
            made = _part(layout, users, size, store.quantization, itemsize, shape)
            layers = list(dict.fromkeys(user.layer for user in users))
            parts.append(made.model_copy(update={"role": "neurons", "d_out": top_k, "layers": layers}))
    parts += _routers(layout, sites, itemsize)
    order = {site.role: place for place, site in reversed(list(enumerate(sites)))}
    return sorted(parts, key=lambda part: (part.layers[0], order.get(part.role, 0)))


def _routers(layout: Layout, sites: Sequence[Site], itemsize: int) -> list[Part]:
    """Return an entry for the router of every block, which the dense model does not have."""
    first = {layout.router_of(site.name): site for site in reversed(sites)}
    parts = []
    for block, spec in layout.routers.items():
        size, shape = router_size(layout, block, itemsize), dict.fromkeys(("d_in", "dense_d_in"), spec.width)
        parts.append(
            Part(
                names=[block],
                role="router",
                layers=[first[block].layer],
                **shape,
                d_out=spec.experts,
                dense_d_out=spec.experts,
                n_primitives=None,
                rank=None,
                top_k=None,
                composition=None,
                experts=spec.recipes,
                active=spec.active,
                quantization="none",
                bits=8.0 * itemsize,
                **{key: getattr(size, key) for key in ("stored", "bytes", "macs", "dense_stored", "dense_macs")},
            )
        )
    return parts


def _part(
    layout: Layout, users: list[Site], size: Size, quantization: str, itemsize: int, shape: dict[str, Any]
) -> Part:
    d_in, d_out = layout.shape(users[0].name)
    dense_in, dense_out = layout.host_shape(users[0].name)
    bits = FORMATS[quantization].bits
    if router := layout.routers.get(layout.router_of(users[0].name)):
        shape = shape | {"experts": router.recipes, "active": router.active}
    return Part(
        names=[site.name for site in users],
        role=users[0].role,
        layers=[site.layer for site in users],
        d_in=d_in,
        d_out=d_out,
        dense_d_in=dense_in,
        dense_d_out=dense_out,
        **shape,
        quantization=quantization,
        bits=8.0 * itemsize if bits is None else float(bits),
        stored=size.stored,
        bytes=size.bytes,
        macs=size.macs,
        dense_stored=size.dense_stored,
        dense_macs=size.dense_macs,
    )
