"""The layout that a model's config.json holds."""

from typing import Any

from pilon_compress.errors import BadInput
from pilon_compress.nn.layout import Layout


def stored_layout(config: Any) -> Layout | None:
    """The layout in the `quantization_config` of a config; None of a model without one of ours.

    Raises BadInput for a layout that is damaged.
    """
    found = getattr(config, "quantization_config", None)
    plain = found if isinstance(found, dict) else vars(found) if found is not None else {}
    if plain.get("quant_method") != "pilon":
        return None
    try:
        return Layout.from_dict(plain.get("layout"))
    except ValueError as error:
        raise BadInput(f"config.json is damaged: {error}") from None
