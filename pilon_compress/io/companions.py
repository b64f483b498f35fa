"""Find and copy a model's companions: files that other tools need beside weights, config and tokenizer.

    sentence-transformers   modules.json, and each module's folder with its weights
    processors              preprocessor_config.json, chat templates, generation_config.json, tokenizer.model
    terms                   LICENSE, NOTICE, USE_POLICY
    code                    .py files that `auto_map` names, and files that they import; never executed here

`find` checks everything before any work is done; `copy` writes inside the target folder only.
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
LIMIT = 1 << 22  # bytes; a longer JSON or Python file is refused
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


class ModelFiles:
    """The files of a local folder or a hub repository; files of a repository are downloaded when they are used."""

    def __init__(self, reference: str) -> None:
        """List the files of a folder or hub id. Raises BadInput where the hub does not list them."""
        self.reference, self.root = reference, Path(reference)
        self.local = self.root.is_dir()
        if not self.local:
            self.root, self.repo_names = _from_hub(reference)

    def names(self) -> list[str]:
        """Return the relative names of all files, including links that lead out of the folder."""
        if not self.local and self.repo_names is not None:
            return self.repo_names
        names = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if not path.is_dir())
        return sorted(name for name in names if not name.startswith(".cache/"))

    def path(self, name: str) -> Path:
        """Return the local path of a file. Raises BadInput for one that lies, or leads, outside the model."""
        if not self.local and self.repo_names is not None:
            from huggingface_hub import hf_hub_download

            try:
                return Path(hf_hub_download(self.reference, name))
            except (OSError, ValueError) as error:
                raise BadInput(f"{self.reference}: cannot download {name} from the hub: {error}") from None
        path = self.root / name
        if not self.holds(path):
            raise BadInput(f"{path} leads out of the model's folder: remove it, or put the file itself there")
        return path

    def holds(self, path: Path) -> bool:
        """Return True for a regular file in the folder, or in the store that a hub cache links to."""
        try:
            resolved = path.resolve(strict=True)
        except (OSError, RuntimeError):
            return False
        homes = [self.root.resolve()]
        if self.root.absolute().parent.name == "snapshots":  # models--OWNER--NAME/snapshots/REVISION
            homes.append(self.root.resolve().parent.parent / "blobs")
        return resolved.is_file() and any(resolved.is_relative_to(home) for home in homes)


def _from_hub(reference: str) -> tuple[Path, list[str] | None]:
    """Return a repository's id and file names; where the hub is out of reach, its cached snapshot and None."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        with hub.reaching() as offline:
            if offline:
                return Path(snapshot_download(reference, local_files_only=True)), None
            return Path(reference), sorted(HfApi().list_repo_files(reference))
    except (OSError, ValueError) as error:
        raise BadInput(f"{reference}: cannot list its files: {str(error).splitlines()[0]}") from None


def find(reference: str, quiet: bool = False) -> dict[str, Path]:
    """Return the companions of a model, a local folder or a hub id: relative name -> file.

    Raises BadInput for a malformed modules.json, and for modules that lie or lead outside the model. Pickled weights of
    modules are left out, with one warning each unless `quiet`.
    """
    source = ModelFiles(reference)
    names = source.names()
    selected = [name for name in names if any(fnmatch(name, pattern) for pattern in PATTERNS) and _flat(name)]
    modules = _modules(source) if MODULES in names else []
    for folder in modules:
        if source.local and not (source.root / folder).resolve().is_relative_to(source.root.resolve()):
            raise BadInput(f"{source.root / folder}, a module of {MODULES}, leads out of the model's folder")
        selected += [name for name in names if PurePosixPath(name).is_relative_to(folder)]
    companions, warnings = dict[str, Path](), list[str]()
    for name in dict.fromkeys(selected):
        if name.endswith(PICKLED):
            warnings.append(f"{reference}/{name} is pickled and therefore not copied: save that module as safetensors")
        elif _flat(name) and source.local and not source.holds(source.root / name) and name != MODULES:
            warnings.append(f"{reference}/{name} is not a file in the model's folder and therefore not copied")
        else:
            companions[name] = source.path(name)
    for line in () if quiet else warnings:
        log.warning("%s", line)
    return companions | _code(source, names)


def _flat(name: str) -> bool:
    return "/" not in name or name.startswith("additional_chat_templates/")


def _modules(source: ModelFiles) -> list[str]:
    """Return the folders in modules.json, without the model's own. Raises BadInput for a malformed file."""
    modules, place = _json(source, MODULES), f"{source.reference}/{MODULES}"
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise BadInput(f"{place} is not a list of modules")
    folders = []
    for module in modules:
        path = module.get("path")
        if not isinstance(path, str):
            raise BadInput(f"{place}: each module needs a `path`, a folder inside the model")
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path or ":" in path:
            raise BadInput(f"{place}: the path {path!r} leads out of the model's folder")
        if pure.parts:
            folders.append(str(pure))
    return folders


def _json(source: ModelFiles, name: str) -> Any:
    path = source.path(name)
    try:
        return json.loads(read_bounded(path, LIMIT))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{source.reference}/{name} cannot be read: {error}") from None


def _code(source: ModelFiles, names: list[str]) -> dict[str, Path]:
    """Return the model's .py files that `auto_map` and modules.json name, and files of the model that they import."""
    stems: list[str] = []
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if name in names:
            data = _json(source, name)
            stems += _stems(data.get("auto_map") if isinstance(data, dict) else None, source.reference)
    if MODULES in names:
        kinds = [str(one.get("type", "")) for one in _json(source, MODULES)]
        stems += [kind.rpartition(".")[0] for kind in kinds if not kind.startswith("sentence_transformers.")]
    code: dict[str, Path] = {}
    while stems:
        name = f"{stems.pop()}.py"
        if name not in names or name in code or "/" in name:
            continue
        code[name] = source.path(name)
        try:
            text = read_bounded(code[name], LIMIT)
        except (OSError, ValueError) as error:
            raise BadInput(f"{source.reference}/{name} cannot be read: {error}") from None
        stems += [word for words in IMPORTED.findall(text) for word in words if word]
    return code


def _stems(auto_map: Any, reference: str) -> list[str]:
    """Return the modules in an `auto_map`: "configuration_my" of "configuration_my.MyConfig", also of lists."""
    values: Iterable[Any] = auto_map.values() if isinstance(auto_map, dict) else ()
    every = [one for value in values for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
    own = [one.removeprefix(f"{reference}--") for one in every]
    return [one.rpartition(".")[0] for one in own if "--" not in one]


def copy(companions: dict[str, Path], folder: Path) -> None:
    """Copy companions into `folder`, without replacing files. Raises BadInput for a name that leads out of it."""
    home = folder.resolve()
    for name, path in companions.items():
        target = folder / name
        if not target.resolve().is_relative_to(home):
            raise BadInput(f"{name} leads out of {folder}: it is not copied")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
