"""The model that is followed: it runs without gradient, and never changes."""

from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pilon_compress.data.batch import Batch
from pilon_compress.distill.kl import CONSTANT, COPIES, SoftTargets, largest
from pilon_compress.distill.losses import next_token_sum
from pilon_compress.distill.students import Wanted
from pilon_compress.errors import BadInput
from pilon_compress.models import checkpoint
from pilon_compress.models.blocks import blocks
from pilon_compress.models.head import Head
from pilon_compress.models.in_memory import held_model
from pilon_compress.nn.functional import mean_pooled, rows_at_once

SMALLEST = 1e-12  # variance of states that are all alike


class Teacher:
    """`model`, frozen. `hidden`: its states are wanted besides its predictions or embeddings."""

    def __init__(self, model: PreTrainedModel, hidden: bool = False) -> None:
        self.model, self.hidden = model.requires_grad_(False).eval(), hidden
        self.model.config.use_cache = False
        self.causal = checkpoint.is_causal(model.config)
        self.head = Head(model) if self.causal else None

    @torch.no_grad()
    def wanted(self, batch: Batch) -> Wanted:
        """Return what a student is given beside `batch`: see `students`."""
        states = {"output_hidden_states": True} if self.hidden else {}
        found = self.model.base_model(**batch.inputs(), **states)
        last = found.last_hidden_state
        wanted: Wanted
        if self.causal:
            wanted = {"soft_targets": self.soft_targets(last.flatten(0, 1))}
        else:
            wanted = {"pooled": mean_pooled(last.float(), batch.mask)}
        if self.hidden:
            wanted["hidden"] = list(found.hidden_states[1:])
        return wanted

    def soft_targets(self, states: Tensor) -> SoftTargets:
        """Return last hidden states (N, d) as predictions."""
        assert self.head is not None
        if not self.head.is_plain:
            return {"logits": self.head(states)}
        matrix, cap = self.head.matrix, self.head.cap
        soft_targets = {"states": states, "head": matrix.weight.detach()}
        if matrix.bias is not None:
            soft_targets["bias"] = matrix.bias.detach()
        return soft_targets if cap is None else soft_targets | {"cap": torch.tensor(cap, device=states.device)}

    @torch.no_grad()
    def largest(self, batch: Batch, count: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Its `count` largest log-probabilities (B, T, k), their tokens, and the log of the remaining mass (B, T)."""
        assert self.head is not None
        states = self.model.base_model(**batch.inputs()).last_hidden_state
        rows = rows_at_once(self.head.out_features, COPIES)
        parts = [largest(self.head(some), count, temperature) for some in states.flatten(0, 1).split(rows)]
        shape = states.shape[:2]
        values, tokens, rest = (torch.cat([part[i] for part in parts]) for i in range(3))
        return values.view(*shape, -1), tokens.view(*shape, -1), rest.view(shape)

    @torch.no_grad()
    def nats(self, batch: Batch) -> float:
        """Cross-entropy of the text, summed over its scored tokens."""
        assert self.head is not None
        states = self.model.base_model(**batch.inputs()).last_hidden_state
        return float(next_token_sum(self.head, states.flatten(0, 1), batch.targets.flatten()))

    def variance(self, batch: Batch) -> Tensor:
        """(layers,): the mean over dimensions of the variance over tokens of the hidden states."""
        states = self.wanted(batch)["hidden"]
        found = [one[batch.mask].float().var(0, unbiased=False).mean() for one in states]
        return torch.stack(found).clamp_min(SMALLEST)


class CachingTeacher(Teacher):
    """A teacher that keeps what it has given for a batch, up to `limit` bytes, for batches that come again."""

    def __init__(self, model: PreTrainedModel, hidden: bool, limit: int) -> None:
        super().__init__(model, hidden)
        self.left, self.known = limit, dict[int, tuple[Tensor, Wanted]]()

    def wanted(self, batch: Batch) -> Wanted:
        """Return the teacher outputs for `batch`, from the cache if they are in it."""
        key = id(batch.input_ids)  # which stays alive, and so stays its own, as long as it is known
        if key in self.known:
            return self.known[key][1]
        wanted = super().wanted(batch)
        size = _bytes(wanted)
        if size <= self.left:
            self.left, self.known[key] = self.left - size, (batch.input_ids, wanted)
        return wanted


def _bytes(wanted: Wanted) -> int:
    """Memory that what a teacher has given takes, the head left out, which is the teacher's own."""
    soft_targets = [tensor for name, tensor in wanted.get("soft_targets", {}).items() if name not in CONSTANT]
    pooled = [wanted["pooled"]] if "pooled" in wanted else []
    return sum(tensor.nbytes for tensor in (*wanted.get("hidden", ()), *soft_targets, *pooled))


def fingerprint(reference: str) -> str:
    """Return a cheap identity of a teacher: size and time of change of files, name of a hub id.

    A model in memory counts by its weights.
    """
    if (model := held_model(reference)) is not None:
        return "\n".join(f"{name} {_digest(tensor)}" for name, tensor in model.named_parameters())
    folder = Path(checkpoint.resolve(reference))
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"]) if folder.is_dir() else []
    return "\n".join([str(folder), *(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)])


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return blake2b(data.tobytes(), digest_size=16).hexdigest()


def open_teacher(reference: str, student: PreTrainedModel, device: torch.device, hidden: bool) -> Teacher:
    """The teacher, on `device`, in bfloat16 on GPUs. Raises BadInput for one that the student cannot follow."""
    half = device.type == "cuda"
    dtype = torch.bfloat16 if half else torch.float32
    model = checkpoint.load_model(reference, dtype=dtype, device=str(device), share=True)
    ours, theirs = student.config, model.config
    if checkpoint.is_causal(ours) != checkpoint.is_causal(theirs):
        raise BadInput(f"{reference} is a {type(model).__name__}: the model to heal is a {type(student).__name__}")
    if ours.vocab_size != theirs.vocab_size:
        raise BadInput(f"{reference} has {theirs.vocab_size} tokens, the model to heal {ours.vocab_size}: no teacher")
    if not checkpoint.is_causal(ours) and ours.hidden_size != theirs.hidden_size:
        raise BadInput(
            f"{reference} has embeddings of {theirs.hidden_size} numbers, the model to heal {ours.hidden_size}"
        )
    if hidden and (len(blocks(model)), ours.hidden_size) != (len(blocks(student)), theirs.hidden_size):
        raise BadInput(f"{reference} has other layers than the model to heal: set distill.hidden to 0")
    return Teacher(model, hidden)
