"""Recovery: a student follows its dense teacher, in healing and in `convert --refine` alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pilon_compress.config.training_sections import Distill
from pilon_compress.data.batch import Batch
from pilon_compress.distill.students import CausalStudent, EmbeddingStudent, Wanted
from pilon_compress.distill.teacher import Teacher
from pilon_compress.models.task import is_causal
from pilon_compress.optimize import schedule
from pilon_compress.optimize.callbacks import Callback


def hidden_weight(asked: Distill, causal: bool) -> float:
    """Weight of the states' mismatch: as asked for, or 1 for encoders and 0 for causal LMs."""
    return asked.hidden if asked.hidden is not None else 0.0 if causal else 1.0


def student_of(model: PreTrainedModel, asked: Distill, teacher: Teacher | None, measured: Batch) -> nn.Module:
    """The student that `model` is, in evaluation mode: the teacher has no dropout either.

    `measured`: the text from which the variances of the teacher's states are taken, if these are matched.
    """
    variance = teacher.variance(measured) if teacher is not None and teacher.hidden else None
    if is_causal(model.config):
        return CausalStudent(model, asked.temperature, asked.next_token != 0, variance).eval()
    freeze_unused(model)
    return EmbeddingStudent(model, variance).eval()


@dataclass
class Recovery(Callback):
    """Makes batches into arguments of `student`. `teacher`: None where batches bring its predictions along."""

    student: nn.Module
    asked: Distill
    teacher: Teacher | None
    causal: bool
    share: float = 0.0

    def before(self, step: int, share: float) -> None:
        """Store the share of the training that is done, on which the weights of the terms depend."""
        self.share = share

    def prepared(self, batch: Batch) -> tuple[Any, ...]:
        """Arguments of the student in training, at this share of it."""
        asked = self.asked
        hidden = hidden_weight(asked, self.causal) * schedule.fade(self.share, asked.match_until)
        if self.causal and not (asked.kl or hidden):  # the text itself needs no teacher
            return batch.inputs(), batch.targets
        return self._following(batch, (asked.kl, asked.next_token, hidden, asked.pooled))

    def arguments(self, batch: Batch) -> tuple[Any, ...]:
        """Arguments with which the student gives its distance from the teacher alone: KL, or 1 - cosine of texts."""
        return self._following(batch, (1.0, 0.0, 0.0, 1.0))

    def _following(self, batch: Batch, terms: Sequence[float]) -> tuple[Any, ...]:
        wanted = self._wanted(batch)
        if not terms[2]:
            wanted = {name: value for name, value in wanted.items() if name != "hidden"}
        return batch.inputs(), batch.targets, wanted, torch.tensor(terms, device=batch.input_ids.device)

    def _wanted(self, batch: Batch) -> Wanted:
        if batch.soft_targets is not None:
            return {"soft_targets": {name: tensor.flatten(0, 1) for name, tensor in batch.soft_targets.items()}}
        assert self.teacher is not None
        return self.teacher.wanted(batch)


def freeze_unused(model: PreTrainedModel) -> None:
    """Freeze what lies behind an encoder's last hidden states: it gets no gradient, which DDP would wait for."""
    inside = {id(p) for p in model.base_model.parameters()}
    pooler = getattr(model.base_model, "pooler", None)
    behind = {id(p) for p in pooler.parameters()} if pooler is not None else set()
    for parameter in model.parameters():
        if id(parameter) not in inside or id(parameter) in behind:
            parameter.requires_grad_(False)
