"""Models that a Python program hands over as objects: references that hold only inside the call that reads them.

    with hold(model, tokenizer) as reference:       its name_or_path, or memory:LlamaForCausalLM
        checkpoint.load_model(reference)            a copy: the object itself never changes

What was saved with a model, or made it, stays with the object as its `Record`.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pilon_compress.data.memory import SCHEME
from pilon_compress.errors import BadInput
from pilon_compress.nn.installed import layout_of, stored_types
from pilon_compress.results.conversion import Report

RECORD = "_pilon_record"  # attribute of a model
PILON_FORMAT = {"quant_method": "pilon"}


@dataclass(frozen=True)
class Record:
    """The parts of a model folder beside weights and config.

    `companions`: other files of its folder, by relative name. `pages`: contents of recipe, card and report, by name.
    `report`: that of the conversion that made it, if it was made in this process.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    companions: Mapping[str, Path] = field(default_factory=dict)
    pages: Mapping[str, bytes] = field(default_factory=dict)
    report: Report | None = None

    @property
    def recipe(self) -> str | None:
        """YAML of the recipe that made the model."""
        if self.report is not None:
            return self.report.recipe
        page = self.pages.get("recipe.yaml")
        return None if page is None else page.decode("utf-8", "replace")


def record_of(model: PreTrainedModel) -> Record:
    """Return the record of a model; an empty one if it has none."""
    found = getattr(model, RECORD, None)
    return found if isinstance(found, Record) else Record()


def keep_record(model: PreTrainedModel, record: Record) -> None:
    """Let `model` carry `record`."""
    setattr(model, RECORD, record)


class InMemory(NamedTuple):
    """A model that is held, or a tokenizer alone."""

    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None


_held: ContextVar[Mapping[str, InMemory]] = ContextVar("models held in memory", default={})  # noqa: B039 (never changed)


@contextmanager
def hold(model: str | Path | PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[str]:
    """Yield a reference to `model` inside the context; one by name keeps its name. None: to `tokenizer` alone.

    Without a tokenizer, that of the model's record is taken. Raises BadInput for what is neither a name nor a model of
    transformers, and for one whose weights are not all in memory.
    """
    if isinstance(model, str | Path) and tokenizer is None:
        yield str(model)
        return
    if isinstance(model, str | Path):
        name, held = str(model), InMemory(None, tokenizer)
    else:
        if model is not None:
            _check(model)
            tokenizer = tokenizer or record_of(model).tokenizer
        name, held = _name(model, _held.get()), InMemory(model, tokenizer)
    token = _held.set({**_held.get(), name: held})
    try:
        yield name
    finally:
        _held.reset(token)


@contextmanager
def hold_or_none(model: str | Path | PreTrainedModel | None) -> Iterator[str | None]:
    """Yield a reference to `model` as `hold` does, or None for None."""
    if model is None:
        yield None
        return
    with hold(model) as reference:
        yield reference


def _check(model: object) -> None:
    """Raise BadInput for what cannot be held."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        advice = "; merge an adapter into its model first (merge_and_unload)" if hasattr(model, "peft_config") else ""
        raise BadInput(f"a {kind} is no model of transformers, nor the name of one{advice}")
    if any(tensor.is_meta for tensor in model.parameters()) or hasattr(model, "_hf_hook"):
        raise BadInput(f"the weights of this {kind} are not all on one device: load it without device_map")


def _name(model: PreTrainedModel | None, taken: Mapping[str, InMemory]) -> str:
    """Return where the model was loaded from, unless another one has that name; else a name of its own."""
    place = str(getattr(model, "name_or_path", "") or "")
    if place and place not in taken:
        return place
    plain = f"{SCHEME}:{type(model).__name__ if model is not None else 'tokenizer'}"
    return next(name for name in (plain, *(f"{plain}-{count}" for count in range(2, 99))) if name not in taken)


def held_model(reference: str) -> PreTrainedModel | None:
    """Return the object that `reference` stands for; None where it is the name of another model."""
    found = _held.get().get(reference)
    return None if found is None else found.model


def held_tokenizer(reference: str) -> PreTrainedTokenizerBase | None:
    """Return a copy of the tokenizer that was held with `reference`.

    None for other references. Raises BadInput for a held model without a tokenizer.
    """
    found = _held.get().get(reference)
    if found is None:
        return None
    if found.tokenizer is None:
        raise BadInput(f"the {type(found.model).__name__} in memory has no tokenizer: give one, as `tokenizer`")
    return copy.deepcopy(found.tokenizer)  # which may get a padding token


def config_of(model: PreTrainedModel) -> PretrainedConfig:
    """Return a copy of the model's config, with class, dtype and layout of the object."""
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    _name_class(config, model)
    layout = layout_of(model)
    if layout.replaced:
        config.quantization_config = {**PILON_FORMAT, "layout": layout.to_dict()}
    return config


def _name_class(config: PretrainedConfig, model: PreTrainedModel) -> None:
    """Let `config` name the class of the object: AutoModel keeps the name of a head that it leaves out."""
    if not config.architectures or type(model).__module__.startswith("transformers."):
        config.architectures = [type(model).__name__]


@torch.no_grad()
def copy_of(
    model: PreTrainedModel, dtype: torch.dtype | None, device: torch.device, share: bool = False
) -> PreTrainedModel:
    """Return a copy of `model` in eval mode: parameters in `dtype` (None: as they are) on `device`.

    With `share`, tensors that need no change are those of `model`: the copy must then only be read.
    """
    own, memo = stored_types(model), dict[int, Any]()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if id(tensor) in memo:
            continue
        wanted = dtype if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else None
        made = _moved(tensor, None if name in own else wanted, device, share)
        memo[id(tensor)] = nn.Parameter(made, made.is_floating_point()) if isinstance(tensor, nn.Parameter) else made
    memo[id(getattr(model, RECORD, None))] = getattr(model, RECORD, None)  # shared, not copied
    copied: PreTrainedModel = copy.deepcopy(model, memo)
    _name_class(copied.config, model)
    return copied.eval()


def _moved(tensor: Tensor, dtype: torch.dtype | None, device: torch.device, share: bool) -> Tensor:
    made = tensor.detach().to(device=device, dtype=dtype or tensor.dtype)
    return made if share or made.data_ptr() != tensor.data_ptr() else made.clone()
