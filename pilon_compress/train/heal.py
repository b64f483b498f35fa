"""Healing: a converted model follows its dense teacher.

Causal LMs learn its predictions, encoders its embeddings; both may learn its states, whose weight fades.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilon_compress.config.training import TrainRecipe
from pilon_compress.data.corpus import Corpus
from pilon_compress.data.loader import Dataset, Loader, in_order
from pilon_compress.distill.recovery import Recovery, hidden_weight, student_of
from pilon_compress.distill.teacher import Teacher, fingerprint, open_teacher
from pilon_compress.distill.teacher_cache import CacheRequest, DistillationDataset, predictions
from pilon_compress.errors import BadInput
from pilon_compress.evaluate.embeddings import NEIGHBORS, shared_neighbours
from pilon_compress.io import manifest
from pilon_compress.models import checkpoint
from pilon_compress.models.forward import embeddings
from pilon_compress.models.provenance import lineage
from pilon_compress.models.task import vocabulary
from pilon_compress.optimize.training import PERPLEXITY, ValidationMetric
from pilon_compress.parallel import World

COSINE = ValidationMetric("val_cosine", "validation cosine", lambda apart: 1 - apart)
TEACHER_LOSSES = "judged.json"
MEASURED = 8  # validation rows that the variances of the teacher's states are taken from


@dataclass
class Healing:
    """The additional parts of a recovery run: `recovery` gives the student its batches.

    `teacher` is None where its predictions are on disk. `of_teacher`: the teacher's own mean loss on the validation
    text.
    """

    recipe: TrainRecipe
    world: World
    corpus: Corpus
    recovery: Recovery
    metric: ValidationMetric
    reference: str
    of_teacher: float

    def validate(self, wrapped: nn.Module) -> tuple[float, int]:
        """(loss, tokens or texts) of this process's share of the validation slice."""
        loss, scored = 0.0, 0
        for batch in in_order(self.corpus.validation, size_of(self.recipe), self.world.rank, self.world.size):
            batch = batch.to(self.world.device)
            if self.metric is PERPLEXITY:
                loss += float(wrapped(batch.inputs(), batch.labels))
            else:
                loss += float(wrapped(*self.recovery.arguments(batch)))
            scored += batch.scored
        return loss, scored

    def extra_fields(self, loss: float, before: float) -> dict[str, Any]:
        """Return extra result fields: the metric before recovery, the teacher's, and their ratio."""
        extra: dict[str, Any] = {"before": self.metric.of(before), "teacher_model": self.reference}
        extra["teacher"] = self.metric.of(self.of_teacher)
        if self.metric is PERPLEXITY:
            return extra | {"perplexity_ratio": self.metric.of(loss) / extra["teacher"]}
        return extra | (self.neighbours() if self.world.size == 1 else {})

    @torch.no_grad()
    def neighbours(self) -> dict[str, Any]:
        """neighbors10 on the validation texts, if they are enough: see `evaluate.embeddings.measure`."""
        assert self.recovery.teacher is not None
        rows, student = self.corpus.validation, self.recovery.student.get_submodule("model")
        if len(rows) <= NEIGHBORS:
            return {}
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        for batch in in_order(rows, size_of(self.recipe)):
            batch = batch.to(self.world.device)
            for model, found in ((student, ours), (self.recovery.teacher.model, theirs)):
                found.append(embeddings(model, batch).cpu())
        return {"neighbors10": shared_neighbours(torch.cat(ours), torch.cat(theirs))}


def size_of(recipe: TrainRecipe) -> int:
    """Rows that are run at a time where no gradient is taken."""
    return recipe.run.micro_batch_size or recipe.run.batch_size


def teacher_of(recipe: TrainRecipe) -> str:
    """The teacher's reference. Raises BadInput where none is named and the model does not tell where it comes from."""
    assert recipe.start is not None
    found = recipe.teacher or lineage(checkpoint.resolve(recipe.start)).dense
    if found is None:
        raise BadInput(f"{recipe.start} does not tell which dense model it was converted from: name it with --teacher")
    try:
        checkpoint.load_config(found)
    except BadInput as error:
        if recipe.teacher is not None:
            raise
        raise BadInput(f"the dense model that {recipe.start} was converted from, {error}; --teacher names it") from None
    return found


def open_healing(recipe: TrainRecipe, world: World, model: PreTrainedModel, corpus: Corpus, quiet: bool) -> Healing:
    """Load the teacher, or have its predictions on disk, and make the trainee. Raises BadInput for what cannot be."""
    asked, causal = recipe.distill, checkpoint.is_causal(model.config)
    hidden = hidden_weight(asked, causal) > 0
    reference = teacher_of(recipe)
    teacher: Teacher | None = None

    def opened() -> Teacher:
        nonlocal teacher
        teacher = teacher or open_teacher(reference, model, world.device, hidden)
        return teacher

    cache: Path | None = None
    if asked.cache_teacher:
        batches, cache = remembered(recipe, world, model, corpus, reference, opened, quiet)
        corpus = replace(corpus, batches=batches)
    of_teacher = teacher_loss(corpus.validation, recipe, world, opened, cache) if causal else 0.0
    shown = None if cache is not None else opened()
    first = corpus.validation.batch(range(min(MEASURED, len(corpus.validation))))
    student = student_of(model, asked, shown, first.to(world.device))
    if recipe.run.gradient_checkpointing:
        student.train()
    return Healing(
        recipe=recipe,
        world=world,
        corpus=corpus,
        recovery=Recovery(student, asked, shown, causal),
        metric=PERPLEXITY if causal else COSINE,
        reference=reference,
        of_teacher=of_teacher,
    )


def remembered(
    recipe: TrainRecipe,
    world: World,
    model: PreTrainedModel,
    corpus: Corpus,
    reference: str,
    teacher: Callable[[], Teacher],
    quiet: bool,
) -> tuple[Loader, Path]:
    """The training batches with the teacher's predictions from disk, and the folder that these are in."""
    loader, asked = corpus.batches, recipe.distill
    assert isinstance(loader, Loader)  # the recipe sees to it that the text is stored
    steps = steps_of(recipe, corpus)
    seen = range(len(loader.dataset))
    if steps * recipe.run.batch_size < len(loader.dataset):
        seen = sorted({index for step in range(steps) for index in loader.indices(step)})  # type: ignore[assignment]
    tokens: Any = loader.dataset
    request = CacheRequest(
        dataset=loader.dataset,
        indices=np.array(seen, np.int64),
        length=recipe.data.sequence_length,
        count=min(asked.cache_teacher, vocabulary(model.config)),
        vocabulary=vocabulary(model.config),
        temperature=asked.temperature,
        made_from=f"{fingerprint(reference)}\n{tokens.tokens.about.key}\n{recipe.data.respect_documents}",
    )
    dataset: DistillationDataset = predictions(request, teacher, world, size_of(recipe), quiet=quiet)
    return Loader(dataset, loader.batch_size, loader.seed, loader.micro_batches), dataset.folder


def teacher_loss(
    rows: Dataset, recipe: TrainRecipe, world: World, teacher: Callable[[], Teacher], cache: Path | None
) -> float:
    """The teacher's mean loss on the validation text; it is stored in `cache`, so that it is run once."""
    batches = list(in_order(rows, size_of(recipe), world.rank, world.size))
    state = blake2b(digest_size=16)
    for batch in batches:
        state.update(batch.targets.numpy().tobytes())
    path = cache / TEACHER_LOSSES if cache is not None else None
    known = manifest.read_json(path) if path is not None else None
    known = known if isinstance(known, dict) else {}
    key = state.hexdigest()
    if world.total(float(key not in known))[0]:
        nats = sum(teacher().nats(batch.to(world.device)) for batch in batches)
        total, scored = world.total(nats, float(sum(batch.scored for batch in batches)))
        known[key] = total / max(1.0, scored)
        if path is not None and world.size == 1:
            manifest.write_json(path, known)
    return float(known[key])


def tokens_of(recipe: TrainRecipe, corpus: Corpus) -> int:
    """Tokens to train on. Raises BadInput where nobody can know how many."""
    tokens = recipe.schedule.tokens or corpus.tokens
    if tokens is None:
        raise BadInput("streamed text has no known length: say how many tokens to train on with --tokens")
    return tokens


def steps_of(recipe: TrainRecipe, corpus: Corpus) -> int:
    """Optimiser steps. Raises BadInput as `tokens_of`."""
    tokens = tokens_of(recipe, corpus)
    return max(1, int(tokens // (recipe.run.batch_size * (corpus.per_row or recipe.data.sequence_length))))
