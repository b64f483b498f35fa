"""Register base architectures: functions from sizes to the config of a transformers model.

    @base_architecture("llama", about="RMSNorm, RoPE, gated feed-forward block (SwiGLU).", model="LlamaForCausalLM")
    def config(**sizes):
        return LlamaConfig(**sizes)

`sizes` are named as in LlamaConfig. The feed-forward projections are found by their shapes (`families.detect`); where
they would not be, `projections` names them. An architecture that transformers does not have brings its class in place
of `model`'s name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pilon_compress.plugins import Registry

if TYPE_CHECKING:  # recipes are checked without transformers
    from transformers import PretrainedConfig, PreTrainedModel

MakeConfig = Callable[..., "PretrainedConfig"]


@dataclass(frozen=True)
class BaseArchitecture:
    """A causal language model that is trained from scratch.

    about: one sentence   model: name of its class, or the class   config: the config for keyword arguments of sizes
    """

    name: str
    about: str
    model: "str | type[PreTrainedModel]"
    config: MakeConfig

    @property
    def class_name(self) -> str:
        """Return the name of the model class."""
        return self.model if isinstance(self.model, str) else self.model.__name__


ARCHITECTURES: Registry[BaseArchitecture] = Registry("base architecture", "pilon_compress.models.architectures")


def base_architecture(
    name: str,
    *,
    about: str,
    model: "str | type[PreTrainedModel]",
    projections: Mapping[str, str] | None = None,
) -> Callable[[MakeConfig], MakeConfig]:
    """Register the decorated function as the base architecture `name` (`host.family` of a recipe).

    `projections`: role (up, gate, gate_up, down) -> path below a transformer block, of a class that is given as
    `model`. Such a class is registered with transformers' AutoConfig, AutoModelForCausalLM, and as a family.
    """

    def register(config: MakeConfig) -> MakeConfig:
        if not isinstance(model, str):
            _register_class(model, projections)
        ARCHITECTURES.add(name, BaseArchitecture(name, about, model, config))
        return config

    return register


def _register_class(model: "type[PreTrainedModel]", projections: Mapping[str, str] | None) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from pilon_compress.models.families import FAMILIES, Family

    kind: Any = model.config_class
    AutoConfig.register(kind.model_type, kind)
    AutoModelForCausalLM.register(kind, model)
    if projections is not None:
        FAMILIES.add(kind.model_type, Family(dict(projections)))
