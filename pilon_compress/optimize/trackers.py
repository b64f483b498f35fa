"""Send metrics to tensorboard, wandb or trackio, which users install themselves."""

import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from pilon_compress.errors import BadInput

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Tracker(Protocol):
    """Receives the numbers of a step."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Record the figures of a step."""

    def close(self) -> None:
        """Write out all that was recorded."""


class _Tensorboard:
    def __init__(self, folder: Path) -> None:
        self.writer = _module("tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandbLike:
    """wandb, and trackio, which has its interface."""

    def __init__(self, name: str, folder: Path) -> None:
        self.module = _module(name)
        where = {"dir": str(folder)} if name == "wandb" else {}
        self.module.init(project="pilon-compress", name=folder.name, **where)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.module.log(figures, step=step)

    def close(self) -> None:
        self.module.finish()


def check_trackers(names: Iterable[str]) -> None:
    """Raise BadInput for a tracker that is not installed."""
    for name in names:
        _module(name)


def open_tracker(name: str, output: Path) -> Tracker:
    """The tracker of a run that writes to `output`. Raises BadInput where it cannot begin, as without a login."""
    try:
        return _Tensorboard(output) if name == "tensorboard" else _WandbLike(name, output)
    except BadInput:
        raise
    except Exception as error:  # whatever a service on the network may raise
        reason = [*str(error).splitlines(), type(error).__name__][0]
        raise BadInput(f"run.track: {name} did not start: {reason}") from error


def _module(name: str) -> Any:
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:
        lacking = f" ({error})" if importlib.util.find_spec(name) else ""
        raise BadInput(f"run.track names {name}, which is not installed: pip install {name}{lacking}") from None
