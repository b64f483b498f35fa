"""Where models come from: a folder, an installed package, or the hub; and what is wrong with one that does not load."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from pilon_compress import hub
from pilon_compress.errors import BadInput

DTYPES = ("auto", "float32", "bfloat16", "float16")
PACKAGE = "package:"
HUB_HELP = "a local folder or package:NAME works without it"

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, StrictDataclassError)
"""What transformers raises for a config or tokenizer that it cannot read (JSON errors are ValueErrors)."""

logging.disable_progress_bar()  # ours are enough
logging.set_verbosity_error()  # what matters of its reports is refused here, in one line
# Otherwise transformers asks a bot to open a pull request in a hub repository that has pickled weights only.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


def resolve(reference: str) -> str:
    """A local folder for a path or `package:NAME`; a hub id unchanged. Raises BadInput for what cannot be one of these.

    `package:NAME` is the folder inside the installed package NAME that holds a config.json beside weights. The package
    is found, not imported.
    """
    if reference.startswith(PACKAGE):
        return str(_in_package(reference.removeprefix(PACKAGE)))
    path = Path(reference).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"{reference} holds no config.json: not a model folder")
        return str(path)
    if path.exists():
        raise BadInput(f"{reference} is a file; a model is a folder with config.json and safetensors")
    if reference.startswith((".", "/", "~")) or reference.count("/") > 1 or os.sep != "/" and os.sep in reference:
        raise BadInput(f"there is no folder {reference}")
    return reference


def _in_package(name: str) -> Path:
    spec = find_spec(name) if name.isidentifier() else None
    for root in (spec.submodule_search_locations or []) if spec else []:
        configs = sorted(Path(root).rglob("config.json"), key=lambda path: (len(path.parts), str(path)))
        for config in configs:
            if any(config.parent.glob("*.safetensors")):
                return config.parent
    what = "ships no config.json beside safetensors" if spec else "is not installed"
    raise BadInput(f"package {name!r} {what}")


def load_config(reference: str) -> PretrainedConfig:
    """The model's config. Raises BadInput if it is missing, unreadable or of an unknown architecture."""
    folder = resolve(reference)
    try:
        config = AutoConfig.from_pretrained(folder, **_where(folder))
    except UNREADABLE as error:
        raise _refusal(reference, folder, error) from error
    return config


def load_tokenizer(reference: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises BadInput if there is none."""
    folder = resolve(reference)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **_where(folder))
    except UNREADABLE as error:
        if not Path(folder).is_dir():
            raise _refusal(reference, folder, error) from error
        raise BadInput(f"{reference} has no tokenizer that loads: {_first_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # without files transformers invents one that knows no words
        raise BadInput(f"{reference} has no tokenizer: copy the files (tokenizer.json, ...) of the model it comes from")
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The dense architecture of `config` on the meta device: shapes without memory. A PILON config gives its host."""
    with torch.device("meta"):
        return build(config)


def build(config: PretrainedConfig) -> PreTrainedModel:
    """The dense architecture of `config`, where and how the caller has parameters made."""
    plain = type(config).from_dict(config.to_dict())
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    kind = _architecture(config)
    try:
        return kind(plain) if kind is not None else AutoModel.from_config(plain)
    except (ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
        raise BadInput(f"{config.model_type} is no model that can be built: {_first_line(error)}") from error


def check_dense(reference: str, config: PretrainedConfig) -> None:
    """Raise BadInput for a model whose weights are not plain matrices: PILON already, or quantised."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    if method == "pilon":
        raise BadInput(f"{reference} is a PILON model already: convert the dense model that it was made from")
    raise BadInput(f"{reference} is quantised ({method}): convert the model that it was made from")


def load_model(reference: str, dtype: str | torch.dtype = "auto", device: str = "cpu") -> PreTrainedModel:
    """Load weights (safetensors only, no code from the checkpoint) with the class that the config names, in eval mode.

    Raises BadInput for files that are missing, truncated, or hold other tensors than the architecture.
    """
    wanted = find_dtype(dtype) if isinstance(dtype, str) else dtype
    target = find_device(device)
    folder = resolve(reference)
    kind = _architecture(load_config(reference)) or AutoModel
    if Path(folder).is_dir():
        _check_weights(Path(folder))
    try:
        model, loaded = kind.from_pretrained(
            folder, dtype=wanted or "auto", use_safetensors=True, output_loading_info=True, **_where(folder)
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _refusal(reference, folder, error) from error
    if missing := sorted(loaded["missing_keys"]):  # transformers leaves them random
        raise BadInput(f"{reference} lacks {len(missing)} tensors of {type(model).__name__}, the first is {missing[0]}")
    return model.to(target).eval()


def find_dtype(name: str) -> torch.dtype | None:
    """What `name` means: one of DTYPES, None for auto. Raises BadInput."""
    if name not in DTYPES:
        raise BadInput(f"dtype {name!r} is none of {', '.join(DTYPES)}")
    found: torch.dtype | None = getattr(torch, name, None)
    return found


def find_device(name: str) -> torch.device:
    """The device of that name; auto: cuda where it is present, else cpu. Raises BadInput where it is not available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name!r} is not available: {str(error).splitlines()[0]}") from None


def is_causal(config: PretrainedConfig) -> bool:
    """Whether the model predicts the next token."""
    return any(name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in config.architectures or [])


def check_finite(model: PreTrainedModel) -> None:
    """Raise BadInput naming the first parameter that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise BadInput(f"the weight {name} holds NaN or infinite values")


def _architecture(config: PretrainedConfig) -> Any:
    """The class that the config names, so that heads are kept; None if it names none that is known."""
    for name in config.architectures or []:
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            return kind
    return None


def _where(folder: str) -> dict[str, Any]:
    """Local folders never ask the hub, and nothing does when it is out of reach."""
    return {"local_files_only": Path(folder).is_dir() or hub.offline(), "trust_remote_code": False}


def _check_weights(folder: Path) -> None:
    """Open every safetensors file and read its header, which also checks the length of the file."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # JSON and UTF-8 errors are ValueErrors
            raise BadInput(f"{index} is not a weight index: {_first_line(error)}") from None
        if lost := sorted(named - {path.name for path in files}):
            raise BadInput(f"{folder} lacks {lost[0]}, which its index names")
    if not files:
        legacy = any(folder.glob("*.bin"))
        reason = "only pickled weights (.bin), which are not loaded; save it as safetensors" if legacy else "no weights"
        raise BadInput(f"{folder} holds {reason}")
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{path} is truncated or corrupt: {_first_line(error)}") from error


def _refusal(reference: str, folder: str, error: Exception) -> BadInput:
    if Path(folder).is_dir():
        return BadInput(f"{reference} does not load: {_first_line(error)}")
    if reason := hub.unreachable():
        return BadInput(
            f"{reference} is neither a folder nor cached, and the hub is out of reach ({reason}); {HUB_HELP}"
        )
    return BadInput(f"{reference} does not load from the hub: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
