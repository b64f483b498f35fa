"""Training on several processes: torchrun starts them, DDP copies the model to each or FSDP2 shards it.

    torchrun --nproc_per_node 2 -m pilon_compress.cli train --recipe 48m -o out/48m

Every process sees its share of each batch, and gradients are averages over processes; `World.scale` makes them means
over all tokens. Banks are shared by layers, so each is a unit of its own for FSDP: it is gathered when the first
layer calls it, and stays so until the backward pass has passed through all of them.
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


@dataclass(frozen=True)
class World:
    """The processes of a run and the device of this one."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Sums over all processes."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64 if self.device.type == "cpu" else torch.float32)
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


def lone() -> World:
    """This process alone, for work that is not shared out. Raises BadInput under torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("shrink and ffn.dense_until convert on the way, on one process: start it without torchrun")
    return World(0, 1, torch.device("cpu"))


@contextmanager
def join(device: str) -> Iterator[World]:
    """The world that torchrun describes in the environment, or a world of one. Leaves it at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, checkpoint.find_device(device))
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available() and device != "cpu"
    mine = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(mine)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    try:
        yield World(dist.get_rank(), size, mine)
    finally:
        dist.destroy_process_group()


def wrap(trainee: nn.Module, blocks: list[nn.Module], world: World, parallel: str, half: bool) -> nn.Module:
    """The module to call in training: `trainee` itself, DDP around it, or itself sharded by FSDP2.

    `blocks`: its transformer blocks. `half`: bfloat16 copies of sharded parameters for computing.
    """
    if world.size == 1 and parallel != "fsdp":
        return trainee
    if parallel != "fsdp":
        ids = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(trainee, device_ids=ids, gradient_as_bucket_view=True)
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else None
    options: dict[str, Any] = {"mesh": mesh} | ({"mp_policy": policy} if policy else {})
    for module in [*(m for m in trainee.modules() if isinstance(m, PrimitiveBank))]:
        fully_shard(module, reshard_after_forward=False, **options)
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(trainee, **options)
    return trainee


@contextmanager
def last_micro_batch(module: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are exchanged after the last micro batch of a step only."""
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    yield


@torch.no_grad()
def spread(module: nn.Module, world: World) -> None:
    """Give every process the first one's parameters and lasting buffers."""
    if world.size > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def reshard(module: nn.Module) -> None:
    """After a forward pass without a backward one, FSDP units that stay gathered go back to their shards."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
