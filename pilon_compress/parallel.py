"""Train on several processes: torchrun starts them, DDP copies the model to each or FSDP2 shards it.

    torchrun --nproc_per_node 2 -m pilon_compress.cli train --recipe 48m -o out/48m

Every process gets its share of each batch. Gradients are averaged over processes, and the loss of each is scaled by
world size / scored tokens of the step, so that they are means over all tokens. Layers share banks, so each bank is a
unit of its own for FSDP: it is gathered when the first layer calls it, and resharded after the backward pass through
all of them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from pilon_compress.errors import BadInput
from pilon_compress.models import checkpoint
from pilon_compress.nn.bank import PrimitiveBank
from pilon_compress.nn.neuron_bank import NeuronBank


@dataclass(frozen=True)
class World:
    """The processes of a run and the device of this one."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Return True for the process that writes files and messages."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Return the sum of each value over all processes."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64 if self.device.type == "cpu" else torch.float32)
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def wait(self) -> None:
        """Block until every process calls this."""
        if self.size > 1:
            dist.barrier()


def lone() -> World:
    """Return a world of this process alone, for work on one process. Raises BadInput under torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("shrink and ffn.dense_until convert during training, on one process: start without torchrun")
    return World(0, 1, torch.device("cpu"))


@contextmanager
def join(device: str) -> Iterator[World]:
    """Join the process group that torchrun describes in the environment, or yield a world of one process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, checkpoint.find_device(device))
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available() and device != "cpu"
    own_device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(own_device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    try:
        yield World(dist.get_rank(), size, own_device)
    finally:
        dist.destroy_process_group()


def wrap(trainee: nn.Module, blocks: list[nn.Module], world: World, parallel: str, half: bool) -> nn.Module:
    """Return the module to call in training: `trainee` itself, wrapped in DDP, or sharded by FSDP2 in place.

    `blocks`: its transformer blocks. `half`: compute with bfloat16 copies of sharded parameters.
    """
    if world.size == 1 and parallel != "fsdp":
        return trainee
    if parallel != "fsdp":
        ids = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(trainee, device_ids=ids, gradient_as_bucket_view=True)
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else None
    options: dict[str, Any] = {"mesh": mesh} | ({"mp_policy": policy} if policy else {})
    for module in [part for part in trainee.modules() if isinstance(part, PrimitiveBank | NeuronBank)]:
        fully_shard(module, reshard_after_forward=False, **options)
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(trainee, **options)
    return trainee


@contextmanager
def last_micro_batch(module: nn.Module, last: bool) -> Iterator[None]:
    """Exchange gradients inside the block only if this is the `last` micro batch of a step."""
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    yield


@torch.no_grad()
def spread(module: nn.Module, world: World) -> None:
    """Copy the first process's parameters and persistent buffers to all processes."""
    if world.size > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def reshard(module: nn.Module) -> None:
    """Reshard FSDP units that stay gathered after a forward pass without backward pass."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
