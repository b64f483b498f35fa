"""The model that is followed: it runs without gradient, and never changes."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilon_compress.data.batch import Batch
from pilon_compress.distill.kl import COPIES, Goal, largest
from pilon_compress.distill.losses import next_token_sum
from pilon_compress.distill.students import Wanted
from pilon_compress.errors import BadInput
from pilon_compress.models import checkpoint
from pilon_compress.models.blocks import blocks
from pilon_compress.nn.functional import mean_pooled, rows_at_once, soft_capped


class Teacher:
    """`model`, frozen. `hidden`: its states are wanted besides its predictions."""

    def __init__(self, model: PreTrainedModel, hidden: bool = False) -> None:
        self.model = model.requires_grad_(False).eval()
        self.model.config.use_cache = False
        self.causal, self.hidden = checkpoint.is_causal(model.config), hidden

    @torch.no_grad()
    def wanted(self, batch: Batch) -> Wanted:
        """Return what a trainee is given beside `batch`: see `students`."""
        states = {"output_hidden_states": True} if self.hidden else {}
        found = self.model.base_model(**batch.inputs(), **states)
        last = found.last_hidden_state
        wanted: Wanted
        if self.causal:
            wanted = {"goal": self.goal(last.flatten(0, 1))}
        else:
            wanted = {"pooled": mean_pooled(last.float(), batch.mask)}
        if self.hidden:
            wanted["hidden"] = list(found.hidden_states[1:])
        return wanted

    def goal(self, states: Tensor) -> Goal:
        """Last hidden states (N, d) as predictions."""
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        goal = {"states": states, "head": head.weight.detach()}
        return goal if head.bias is None else goal | {"bias": head.bias.detach()}

    @torch.no_grad()
    def largest(self, batch: Batch, count: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Its `count` largest log-probabilities (B, T, k), their tokens, and the log of the remaining mass (B, T)."""
        head, cap = self.model.get_output_embeddings(), getattr(self.model.config, "final_logit_softcapping", None)
        assert isinstance(head, nn.Linear)
        states = self.model.base_model(**batch.inputs()).last_hidden_state
        rows = rows_at_once(head.out_features, COPIES)
        parts = [
            largest(soft_capped(head(part).float(), cap), count, temperature)
            for part in states.flatten(0, 1).split(rows)
        ]
        shape = states.shape[:2]
        values, tokens, rest = (torch.cat([part[i] for part in parts]) for i in range(3))
        return values.view(*shape, -1), tokens.view(*shape, -1), rest.view(shape)

    @torch.no_grad()
    def nats(self, batch: Batch) -> float:
        """Cross-entropy of the text, summed over its scored tokens."""
        head, cap = self.model.get_output_embeddings(), getattr(self.model.config, "final_logit_softcapping", None)
        assert isinstance(head, nn.Linear)
        states = self.model.base_model(**batch.inputs()).last_hidden_state
        return float(next_token_sum(head, states.flatten(0, 1), batch.targets.flatten(), cap))

    def variances(self, batch: Batch) -> Tensor:
        """Return (layers,) variances of the hidden states over tokens, means over dimensions."""
        return torch.stack([_variance(states[batch.mask]) for states in self.wanted(batch)["hidden"]]).clamp_min(1e-12)


def _variance(rows: Tensor) -> Tensor:
    """Mean over dimensions of the variance over `rows` (N, d)."""
    return rows.float().var(0, unbiased=False).mean()


def fingerprint(reference: str) -> str:
    """What tells one teacher from another: cheap, so files count by size and time of change, and hub ids by name."""
    folder = Path(checkpoint.resolve(reference))
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"]) if folder.is_dir() else []
    return "\n".join([str(folder), *(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)])


def open_teacher(reference: str, student: PreTrainedModel, device: torch.device, hidden: bool = False) -> Teacher:
    """The teacher, on `device`, in bfloat16 on GPUs. Raises BadInput for one that the student cannot follow."""
    half = device.type == "cuda"
    model = checkpoint.load_model(reference, dtype=torch.bfloat16 if half else torch.float32, device=str(device))
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
