"""Find a model's class and task in transformers' mappings: language model, text encoder, or neither."""

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from pilon_compress.errors import BadInput

CAUSAL: Mapping[str, str] = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
MASKED: Mapping[str, str] = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
TWO_WAYS = ("xlnet",)
# models of images or sound and text whose text tower predicts the next token
MULTIMODAL: tuple[Mapping[str, str], ...] = tuple(
    getattr(modeling_auto, name, {})
    for name in (
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "MODEL_FOR_VISION_2_SEQ_MAPPING_NAMES",
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    )
)


def architecture(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class that `config` names, so that heads are kept; None for the base model.

    An old spelling (LLaMAForCausalLM) means today's class. A decoder without a name is a causal language model;
    otherwise its head would be lost. Raises BadInput for a name that transformers does not have.
    """
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadInput(f"architectures of a {config.model_type} config must be class names, not {names!r}")
    for name in names:
        kind = _class(name) or _registered(name, config)
        if kind is not None:
            return kind
    if names:
        kind = _spelled_otherwise(names[0], config)
        if kind is None:
            raise BadInput(
                f"{names[0]} is no architecture of transformers {transformers.__version__} for model type "
                f"{config.model_type!r}: correct `architectures` in config.json"
            )
        return kind
    if is_decoder_type(config):
        return _class(_names(CAUSAL, config)[0])
    return None


def is_decoder_type(config: PretrainedConfig) -> bool:
    """Return True for model types that are always language models and never encoders."""
    return bool(_names(CAUSAL, config)) and not _names(MASKED, config)


def is_causal(config: PretrainedConfig) -> bool:
    """Return True if the model, or the text tower of a multimodal one, predicts the next token.

    Some classes that transformers lists as causal read in both directions: those of encoder types without `is_decoder`
    (BERT with a head for generation), and XLNet's.
    """
    kind = architecture(config)
    if kind is None or config.model_type in TWO_WAYS:
        return False
    if _names(MASKED, config) and not getattr(config, "is_decoder", False):
        return False
    known = {name for mapping in (CAUSAL, *MULTIMODAL) for entry in mapping.values() for name in _listed(entry)}
    return kind.__name__ in known or kind in _extra(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, config)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config of the text tower, which is `config` itself for a text model."""
    try:
        tower: PretrainedConfig = config.get_text_config(decoder=True)
    except ValueError:  # several text towers
        return config
    return tower


def vocabulary(config: PretrainedConfig) -> int:
    """Return the number of token ids that the embedding takes. Raises BadInput for a model without embedding."""
    count = getattr(text_config(config), "vocab_size", None)
    if not isinstance(count, int) or count < 1:
        raise BadInput(f"{config.model_type} has no vocabulary: it does not read text")
    return count


def _class(name: str) -> type[PreTrainedModel] | None:
    kind = getattr(transformers, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else None


def _registered(name: str, config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class of that name that `AutoModel...register` has added for configs of this type; or None."""
    mappings = [value for key, value in vars(modeling_auto).items() if key.endswith("_MAPPING")]
    added = [kind for mapping in mappings for kind in _extra(mapping, config)]
    return next((kind for kind in added if kind.__name__ == name), None)


def _extra(mapping: Any, config: PretrainedConfig) -> list[type[PreTrainedModel]]:
    kind = getattr(mapping, "_extra_content", {}).get(type(config))
    return [] if kind is None else [kind]


def _spelled_otherwise(name: str, config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class of the model's type whose name differs in capitals only, or ends with the same head; or None."""
    mappings = [value for key, value in vars(modeling_auto).items() if key.endswith("_MAPPING_NAMES")]
    own = {one for mapping in mappings if isinstance(mapping, Mapping) for one in _names(mapping, config)}
    for one in sorted(own):
        if one.lower() == name.lower():
            return _class(one)
    head = next((head for head in ("ForCausalLM", "LMHeadModel", "ForMaskedLM") if name.endswith(head)), None)
    fitting = [one for one in sorted(own) if head is not None and one.endswith(head)]
    return _class(fitting[0]) if fitting else None


def _names(mapping: Mapping[str, Any], config: PretrainedConfig) -> list[str]:
    return _listed(mapping.get(config.model_type, ()))


def _listed(entry: Any) -> list[str]:
    return [entry] if isinstance(entry, str) else list(entry)
