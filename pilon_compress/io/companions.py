"""A model's companions: files beside weights, config and tokenizer that other tools need, from a folder or the hub.

    sentence-transformers   modules.json, and each module's folder with its weights
    processors              preprocessor_config.json, chat templates, generation_config.json, tokenizer.model
    terms                   LICENSE, NOTICE, USE_POLICY
    code                    .py files that `auto_map` names, and those that they import; never executed here

`find` refuses what must not be copied before any work is done; `copy` writes inside the target folder only.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from pilon_compress.errors import BadInput
from pilon_compress.io import hub
from pilon_compress.io.disk import read_bounded

log = logging.getLogger(__name__)

MODULES = "modules.json"
LIMIT = 1 << 22  # bytes of a JSON or Python file that is read here
PATTERNS = (
    MODULES,
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "router_config.json",
    "*processor_config.json",
    "generation_config.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*.model",
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
)
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack")
IMPORTED = re.compile(r"^\s*(?:from\s+\.(\w+)\s+import|import\s+\.(\w+)|from\s+\.\s+import\s+(\w+))", re.MULTILINE)


class Source:
    """The files of a local folder, or of a hub repository: names, and each one's path once it is asked for."""

    def __init__(self, reference: str) -> None:
        self.reference, self.root = reference, Path(reference)
        self.local = self.root.is_dir()
        if not self.local:
            self.root, self.repo_names = _from_hub(reference)

    def names(self) -> list[str]:
        """Relative names of all files; links that lead out of the folder among them."""
        if not self.local and self.repo_names is not None:
            return self.repo_names
        found = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if not path.is_dir())
        return sorted(name for name in found if not name.startswith(".cache/"))

    def path(self, name: str) -> Path:
        """Where the file is now. Raises BadInput for one that lies, or leads, outside the model."""
        if not self.local and self.repo_names is not None:
            from huggingface_hub import hf_hub_download

            try:
                return Path(hf_hub_download(self.reference, name))
            except (OSError, ValueError) as error:
                raise BadInput(f"{self.reference}: {name} does not load from the hub: {error}") from None
        path = self.root / name
        if not self.holds(path):
            raise BadInput(
                f"{path} leads out of the model's folder: it is not copied; remove it, or put the file there"
            )
        return path

    def holds(self, path: Path) -> bool:
        """True for a regular file in the folder, or in the store that a hub cache links to."""
        try:
            whole = path.resolve(strict=True)
        except (OSError, RuntimeError):
            return False
        homes = [self.root.resolve()]
        if self.root.absolute().parent.name == "snapshots":  # models--OWNER--NAME/snapshots/REVISION
            homes.append(self.root.resolve().parent.parent / "blobs")
        return whole.is_file() and any(whole.is_relative_to(home) for home in homes)


def _from_hub(reference: str) -> tuple[Path, list[str] | None]:
    """A repository: its cached snapshot where the hub is out of reach, else the names of its files."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        with hub.reaching() as offline:
            if offline:
                return Path(snapshot_download(reference, local_files_only=True)), None
            return Path(reference), sorted(HfApi().list_repo_files(reference))
    except (OSError, ValueError) as error:
        raise BadInput(f"{reference}: its files cannot be listed: {str(error).splitlines()[0]}") from None


def find(reference: str, quiet: bool = False) -> dict[str, Path]:
    """The companions of a model, a local folder or a hub id: relative name -> file.

    Raises BadInput for a modules.json that is none, and for modules that lie or lead outside the model. Pickled weights
    of modules are left out, with one line unless `quiet`.
    """
    source = Source(reference)
    names = source.names()
    wanted = [name for name in names if any(fnmatch(name, pattern) for pattern in PATTERNS) and _flat(name)]
    modules = _modules(source) if MODULES in names else []
    for folder in modules:
        if source.local and not (source.root / folder).resolve().is_relative_to(source.root.resolve()):
            raise BadInput(f"{source.root / folder}, a module of {MODULES}, leads out of the model's folder")
        wanted += [name for name in names if PurePosixPath(name).is_relative_to(folder)]
    found, left = dict[str, Path](), list[str]()
    for name in dict.fromkeys(wanted):
        if name.endswith(PICKLED):
            left.append(f"{reference}/{name} is pickled, hence not copied: save that module as safetensors")
        elif _flat(name) and source.local and not source.holds(source.root / name) and name != MODULES:
            left.append(f"{reference}/{name} is no file of the model's folder, hence not copied")
        else:
            found[name] = source.path(name)
    for line in () if quiet else left:
        log.warning("%s", line)
    return found | _code(source, names)


def _flat(name: str) -> bool:
    return "/" not in name or name.startswith("additional_chat_templates/")


def _modules(source: Source) -> list[str]:
    """The folders that modules.json names, but for the model's own."""
    found, place = _json(source, MODULES), f"{source.reference}/{MODULES}"
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise BadInput(f"{place} is no list of modules")
    folders = []
    for one in found:
        path = one.get("path")
        if not isinstance(path, str):
            raise BadInput(f"{place}: each module needs a `path`, a folder inside the model")
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path or ":" in path:
            raise BadInput(f"{place}: the path {path!r} leads out of the model's folder")
        if pure.parts:
            folders.append(str(pure))
    return folders


def _json(source: Source, name: str) -> Any:
    path = source.path(name)
    try:
        return json.loads(read_bounded(path, LIMIT))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{source.reference}/{name} cannot be read: {error}") from None


def _code(source: Source, names: list[str]) -> dict[str, Path]:
    """The .py files of the model that its configs' `auto_map` and its modules name, and those which these import."""
    stems: list[str] = []
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if name in names:
            data = _json(source, name)
            stems += _stems(data.get("auto_map") if isinstance(data, dict) else None, source.reference)
    if MODULES in names:
        kinds = [str(one.get("type", "")) for one in _json(source, MODULES)]
        stems += [kind.rpartition(".")[0] for kind in kinds if not kind.startswith("sentence_transformers.")]
    found: dict[str, Path] = {}
    while stems:
        name = f"{stems.pop()}.py"
        if name not in names or name in found or "/" in name:
            continue
        found[name] = source.path(name)
        try:
            text = read_bounded(found[name], LIMIT)
        except (OSError, ValueError) as error:
            raise BadInput(f"{source.reference}/{name} cannot be read: {error}") from None
        stems += [word for words in IMPORTED.findall(text) for word in words if word]
    return found


def _stems(auto_map: Any, reference: str) -> list[str]:
    """Modules that an `auto_map` names: "configuration_my" of "configuration_my.MyConfig" or "REPO--...", lists too."""
    values: Iterable[Any] = auto_map.values() if isinstance(auto_map, dict) else ()
    every = [one for value in values for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
    own = [one.removeprefix(f"{reference}--") for one in every]
    return [one.rpartition(".")[0] for one in own if "--" not in one]


def copy(found: dict[str, Path], folder: Path) -> None:
    """Copy companions into `folder`, where a file that is there already stays; nothing is written outside it."""
    home = folder.resolve()
    for name, path in found.items():
        target = folder / name
        if not target.resolve().is_relative_to(home):
            raise BadInput(f"{name} leads out of {folder}: it is not copied")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
