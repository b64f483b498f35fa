"""Load configs, tokenizers and dense or PILON models from references, and say in one line why one does not load."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from pilon_compress.elastic.worth import HOW, check_keep
from pilon_compress.errors import BadInput
from pilon_compress.io import hub
from pilon_compress.io.errors import UNREADABLE, first_line, unreadable
from pilon_compress.io.manifest import read_ours, verify_folder
from pilon_compress.models import files
from pilon_compress.models.config_check import check_declared, check_shapes
from pilon_compress.models.in_memory import config_of, copy_of, held_model, held_tokenizer
from pilon_compress.models.quiet import quiet_transformers
from pilon_compress.models.references import resolve
from pilon_compress.models.task import architecture, is_causal, text_config, vocabulary
from pilon_compress.nn.loading import loading_with
from pilon_compress.plugins import import_plugins
from pilon_compress.tiers.loading import InTiers

__all__ = ["architecture", "is_causal", "resolve", "text_config", "vocabulary"]  # re-exported

DTYPES = ("auto", "float32", "bfloat16", "float16")
HUB_HELP = "a local folder, a .gguf file or package:NAME works without it"


def load_config(reference: str) -> PretrainedConfig:
    """Return the model's config, with the dtype of its weights.

    Raises BadInput if the config is missing, unreadable or of an unknown architecture, or if the weights are quantised
    by a method other than PILON.
    """
    import_plugins()  # which may register its architecture
    if (model := held_model(reference)) is not None:
        config = config_of(model)
        _check_method(reference, config)
        check_shapes(config)
        architecture(config)
        return config
    folder = resolve(reference)
    if Path(folder).is_dir():
        files.check_readable(Path(folder))
        check_declared(read_ours(Path(folder) / "config.json"))
        verify_folder(folder, weights=False)
    try:
        with _reading(folder) as where:
            check_declared(PretrainedConfig.get_config_dict(folder, **where)[0])
            config = AutoConfig.from_pretrained(folder, **where)
            _check_method(reference, config)
            if getattr(config, "dtype", None) is None:
                config.dtype = _stored_dtype(folder)
    except BadInput:
        raise
    except UNREADABLE as error:
        raise _refusal(reference, folder, error) from error
    check_shapes(config)
    architecture(config)
    check_shapes(config)
    return config


def load_tokenizer(reference: str) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer. Raises BadInput if there is none, or one that cannot pad."""
    tokenizer = held_tokenizer(reference) or _read_tokenizer(reference)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_tokenizer(reference: str) -> PreTrainedTokenizerBase:
    folder = resolve(reference)
    try:
        with _reading(folder) as where:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **where)
        known = len(tokenizer) > len(tokenizer.all_special_ids)
    except Exception as error:
        if not unreadable(error):
            raise
        if not Path(folder).is_dir():
            raise _refusal(reference, folder, error) from error
        raise BadInput(f"{reference} has no tokenizer that loads: {first_line(error)}") from error
    if not known:  # without files transformers invents one that knows no words
        raise BadInput(f"{reference} has no tokenizer: copy the files (tokenizer.json, ...) of the model it comes from")
    return tokenizer


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build the dense architecture of `config` (also a PILON config) on the meta device: shapes without memory.

    Raises BadInput for an architecture that cannot be built, or does not read token ids.
    """
    with torch.device("meta"):
        model = build(config)
    if model.main_input_name != "input_ids":
        raise BadInput(f"{type(model).__name__} reads {model.main_input_name}, not text")
    vocabulary(config)
    return model


def build(config: PretrainedConfig) -> PreTrainedModel:
    """Build the dense architecture of `config` on the current default device. Raises BadInput if that fails."""
    kind = architecture(config)
    try:
        plain = type(config).from_dict(config.to_dict())
        if hasattr(plain, "quantization_config"):
            del plain.quantization_config
        with quiet_transformers():
            return kind(plain) if kind is not None else AutoModel.from_config(plain)
    except BadInput:
        raise
    except UNREADABLE as error:
        raise BadInput(f"cannot build a model from config type {config.model_type}: {first_line(error)}") from error


def check_dense(reference: str, config: PretrainedConfig) -> None:
    """Raise BadInput for a model whose weights are not plain matrices: PILON already, or quantised."""
    if is_pilon(config):
        raise BadInput(f"{reference} is already a PILON model: convert the dense model that it was made from")
    _check_method(reference, config)


def is_pilon(config: PretrainedConfig) -> bool:
    """Return True if the config is that of a PILON model."""
    return _method(config) == "pilon"


def _check_method(reference: str, config: PretrainedConfig) -> None:
    """Raise BadInput for weights in a quantised format that is not PILON's."""
    method = _method(config)
    if method not in (None, "pilon"):
        raise BadInput(f"{reference} is quantised ({method}): name the unquantised model that it was made from")


def _method(config: PretrainedConfig) -> object:
    """Return the quantisation method in a config; None where weights are not quantised."""
    settings = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return getattr(method, "value", method) or "by a method that its config does not name"


def load_model(
    reference: str,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    share: bool = False,
    keep: float | None = None,
    n_hot: float | None = None,
) -> PreTrainedModel:
    """Load weights (safetensors only, no code from the checkpoint) with the class that the config names, in eval mode.

    `share`: the caller only reads the model, which may then have tensors in common with one that is held in memory.
    `keep`: share of the feed-forward numbers to load from a file whose neurons lie in falling order of worth.
    `n_hot`: share of each bank's primitives to hold in memory, the others stay in the file: see `tiers`.
    Raises BadInput for files that are missing, truncated, or hold other tensors than the architecture, and for values
    that are NaN or infinite.
    """
    load_dtype = find_dtype(dtype) if isinstance(dtype, str) else dtype
    target = find_device(device)
    folder = resolve(reference)
    config = load_config(reference)
    where_cut = {} if keep is None else {"keep": _checked_keep(reference, config, keep)}
    in_tiers = nullcontext() if n_hot is None else loading_with(_checked_tiers(reference, config, n_hot, keep))
    if (held := held_model(reference)) is not None:
        copied = copy_of(held, load_dtype, target, share)
        check_finite(copied)
        return copied
    kind = architecture(config)
    if Path(folder).is_dir():
        files.check_weights(Path(folder))
        verify_folder(folder)
    try:
        with _reading(folder) as where, in_tiers:
            model, loaded = (kind or AutoModel).from_pretrained(
                folder,
                dtype=load_dtype or config.dtype or "auto",
                use_safetensors=True,
                output_loading_info=True,
                **where_cut,
                **where,
            )
    except BadInput:
        raise
    except UNREADABLE as error:
        raise _refusal(reference, folder, error) from error
    _check_complete(reference, config, model, loaded)
    model = model.to(target).eval()
    check_finite(model)
    return model


def _checked_keep(reference: str, config: PretrainedConfig, keep: float) -> float:
    """Return `keep`. Raises BadInput for a share that is out of range, and for a model that cannot be cut."""
    check_keep(keep)
    if held_model(reference) is not None:
        raise BadInput("a model in memory cannot be cut: name the folder that was converted with --elastic")
    if not hasattr(config, "keep"):
        raise BadInput(f"{reference} is not stored in order of worth, so it cannot be cut: {HOW}")
    return keep


def _checked_tiers(reference: str, config: PretrainedConfig, n_hot: float, keep: float | None) -> InTiers:
    """Return what loads in tiers. Raises BadInput for a model that it is not for."""
    if isinstance(n_hot, bool) or not isinstance(n_hot, int | float) or not 0 < n_hot < 1:
        raise BadInput(f"n_hot must be above 0 and below 1, a share of each bank's primitives (got {n_hot!r})")
    if held_model(reference) is not None:
        raise BadInput("a model in memory has no tiers: name the folder that it was saved to")
    if _method(config) != "pilon":
        raise BadInput(f"{reference} is dense, and tiers are for the banks of PILON models: leave --tier out")
    if keep not in (None, 1):
        raise BadInput("a model that is cut has no banks to put in tiers: leave out one of the two, keep or the tiers")
    return InTiers(n_hot)


def _check_complete(reference: str, config: PretrainedConfig, model: PreTrainedModel, loaded: dict[str, Any]) -> None:
    """Raise BadInput where files and architecture hold different tensors; `loaded`: transformers' loading info."""
    unused = sorted(loaded["unexpected_keys"])
    if unused and type(model).__name__ not in (config.architectures or []):
        raise BadInput(
            f"{reference} holds tensors that a {type(model).__name__} has no place for, the first is {unused[0]}: "
            "name its class as `architectures` in config.json"
        )
    if missing := sorted(loaded["missing_keys"]):  # transformers would leave them random
        raise BadInput(f"{reference} lacks {len(missing)} tensors of {type(model).__name__}, the first is {missing[0]}")


def _stored_dtype(folder: str) -> torch.dtype | None:
    """Return the dtype of most weights in the files, for a config without `dtype`; None where it cannot be read yet."""
    if Path(folder).is_dir():
        try:
            return files.stored_dtype(files.weight_files(Path(folder))[:1])
        except BadInput:  # reported when the weights are loaded
            return None
    try:
        path = cached_file(folder, SAFE_WEIGHTS_NAME, local_files_only=hub.unreachable() is not None)
    except OSError:  # in shards: transformers reads the dtype when it loads them
        return None
    return files.stored_dtype([Path(path)]) if path else None


def find_dtype(name: str) -> torch.dtype | None:
    """Return the torch dtype of `name`, one of DTYPES; None for auto. Raises BadInput for another name."""
    if name not in DTYPES:
        raise BadInput(f"dtype must be one of {', '.join(DTYPES)} (got {name!r})")
    dtype: torch.dtype | None = getattr(torch, name, None)
    return dtype


def find_device(name: str) -> torch.device:
    """Return the device `name`; auto: cuda where it is present, else cpu. Raises BadInput for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name!r} is not available: {str(error).splitlines()[0]}") from None


def check_finite(model: PreTrainedModel) -> None:
    """Raise BadInput naming the first parameter that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise BadInput(f"the weight {name} holds NaN or infinite values")


@contextmanager
def _reading(folder: str) -> Iterator[dict[str, Any]]:
    """Silence transformers inside the context, and yield the options of `from_pretrained` to read `folder` with.

    The options prevent requests to the hub for local folders, and for all when it is out of reach.
    """
    local = Path(folder).is_dir()
    with quiet_transformers(), nullcontext(False) if local else hub.reaching() as offline:
        yield {"local_files_only": local or offline, "trust_remote_code": False}


def _refusal(reference: str, folder: str, error: Exception) -> BadInput:
    if Path(folder).is_dir():
        return BadInput(f"{reference} does not load: {first_line(error)}")
    if reason := hub.unreachable():
        return BadInput(
            f"{reference} is neither a folder nor cached, and the hub is out of reach ({reason}); {HUB_HELP}"
        )
    return BadInput(f"{reference} cannot be loaded from the hub: {first_line(error)}")
