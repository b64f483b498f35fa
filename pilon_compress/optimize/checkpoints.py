"""Checkpoints: everything that a run needs to go on as if it had never stopped.

    OUT/checkpoints/step-00001200/
      *.safetensors    weights, the best of them and optimiser states; each process writes its own shards
      *.stream         each process's place in streamed text
      state.json       step, recipe, best validation so far; a folder without it is none
      manifest.json    checksums of all of these

A state depends on nothing but the step otherwise: data order, schedules and selections are functions of it. Files are
read back by any number of processes.
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pilon_compress.data.corpus import Streamed
from pilon_compress.errors import BadInput
from pilon_compress.io import manifest
from pilon_compress.io.checksum import damage
from pilon_compress.io.disk import DiskFull, atomic_folder, disk_full, part_of
from pilon_compress.io.errors import UNREADABLE, first_line
from pilon_compress.parallel import World

STATE = "state.json"
FORMAT = 2
NUMBERS = ("tokens", "seconds", "halvings", "restarted")  # of a checkpoint's plain data
PERHAPS = ("mean", "best", "before")  # numbers, or None


class Checkpoints:
    """The checkpoints of one output folder; the last `keep` stay."""

    def __init__(self, output: Path, world: World, keep: int = 2) -> None:
        self.folder, self.world, self.keep = output / "checkpoints", world, keep

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        found = self.folder.glob(f"step-*/{STATE}")
        return sorted(int(path.parent.name.removeprefix("step-")) for path in found)

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of `step`."""
        return self.folder / f"step-{step:08d}"

    def stream(self, step: int) -> Path:
        """Return the file of this process's place in streamed text."""
        return self.path(step) / f"rank{self.world.rank}.stream"

    def save(
        self, step: int, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], stream: Streamed | None = None
    ) -> None:
        """Write a checkpoint; it appears whole or not at all, and only then are older ones removed.

        All processes take part. Raises BadInput where the disk is full: earlier checkpoints are still there.
        """
        target = self.path(step)
        if self.world.first:
            for left in self.folder.glob(part_of(self.folder / "step-*").name):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        opened = atomic_folder(target, manifest.write) if self.world.first else nullcontext(part_of(target))
        with self._full_disk(step), opened as work:
            self.world.wait()
            failure: BaseException | None = None
            try:
                _write(tensors, work, self.world)
                if stream is not None:
                    stream.save(work / self.stream(step).name)
            except (OSError, SafetensorError, CheckpointException) as error:
                failure = error
            if self.world.total(float(failure is not None))[0]:
                raise failure or BadInput(f"no checkpoint of step {step}: another process could not write")
            if self.world.first:
                (work / STATE).write_text(json.dumps({"format": FORMAT, "step": step, **plain}))
        if self.world.first:
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old), ignore_errors=True)
        self.world.wait()

    @contextmanager
    def _full_disk(self, step: int) -> Iterator[None]:
        """Raise DiskFull, which names the checkpoint that stays, for whatever reports a full disk."""
        try:
            yield
        except (OSError, SafetensorError, CheckpointException) as error:
            reason = next(filter(None, map(disk_full, _causes(error))), None)
            if reason is None:
                raise
            raise DiskFull(f"no checkpoint of step {step}: {reason}; {self.kept()}", reason) from error

    def kept(self) -> str:
        """Name the checkpoint that a full disk leaves, for messages."""
        return f"that of step {steps[-1]} stays" if (steps := self.steps()) else self.standing()

    def standing(self) -> str:
        """Name the checkpoint that a run which ends now goes on from, for messages."""
        steps = self.steps()
        if steps:
            return f"the checkpoint of step {steps[-1]} stands, --resume goes on from it"
        return "there is no checkpoint yet, --resume begins again"

    def plain(self, step: int) -> dict[str, Any]:
        """The `plain` data of `save`, with `step`. Raises BadInput for a checkpoint that is damaged or not ours."""
        path = self.path(step) / STATE
        reason = damage(self.path(step)) if self.world.first else None
        if self.world.total(float(reason is not None))[0]:
            self._refuse(step, f"{self.path(step)} does not load: {reason or 'the first process finds it damaged'}")
        found = manifest.read_ours(path)
        if found.get("format") != FORMAT:
            raise BadInput(f"{path} is in format {found.get('format')}, not the {FORMAT} read here")
        for name in (*NUMBERS, *PERHAPS):
            numbers = (int, float) if name in NUMBERS else (int, float, type(None))
            if not isinstance(found.get(name), numbers) or isinstance(found.get(name), bool):
                self._refuse(step, f"{path} has no number `{name}`")
        return found

    def _refuse(self, step: int, reason: str) -> NoReturn:
        older = [one for one in self.steps() if one < step]
        rest = f"to go on from step {older[-1]}" if older else "to begin again"
        raise BadInput(f"{reason}: delete {self.path(step)} {rest}")

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Read, in place, into tensors of the same names and shapes. Raises BadInput for files that do not match."""
        path = self.path(step)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load(
                    dict(tensors),
                    storage_reader=HuggingFaceStorageReader(str(path)),
                    no_dist=self.world.size == 1,
                )
        except (*UNREADABLE, CheckpointException) as error:
            self._refuse(step, f"{path} does not load: {first_line(_causes(error)[0])}")


def _causes(error: BaseException) -> list[Exception]:
    """Return the exceptions of all processes."""
    if isinstance(error, CheckpointException):
        return [cause for cause, _ in error.failures.values() if isinstance(cause, Exception)]
    return [error] if isinstance(error, Exception) else []


def _write(tensors: Mapping[str, Tensor], folder: Path, world: World) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        save(dict(tensors), storage_writer=writer, no_dist=world.size == 1)


def tensors_of(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the tensors of a run by name: parameters, buffers, optimiser states (zeros where there are none yet)."""
    found: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.named_parameters()}
    passing = {f"{name}.{leaf}" for name, part in model.named_modules() for leaf in part._non_persistent_buffers_set}
    found |= {f"buffer.{name}": tensor for name, tensor in model.named_buffers() if name not in passing}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for key, tensor in ready(optimizer, parameter).items():
                    found[f"optimizer{index}.{key}.{names[id(parameter)]}"] = tensor
    return {name: tensor.detach() for name, tensor in found.items()}


def ready(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the tensors of a parameter's state, as the optimiser would begin it where there is none yet."""
    state = optimizer.state[parameter]
    if not state:
        if isinstance(optimizer, torch.optim.AdamW):
            # one number each, kept on the parameter's device by the fused form
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        else:
            state["momentum"] = torch.zeros_like(parameter)
    return {key: value for key, value in state.items() if torch.is_tensor(value)}
