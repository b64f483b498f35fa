"""The texts of a conversion: what it is calibrated on, what a refinement learns from, and what judges the result."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from pilon_compress.config.conversion import Evaluation, Recipe
from pilon_compress.data import calibration, sequences, text
from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.evaluate import evaluate

log = logging.getLogger(__name__)

BLOCK_POOL = 1024  # blocks of text that calibration draws from, or four times as many as it draws
EXAM = 4  # trials of shared banks read a quarter of the calibration's text
LESSONS = 8  # refinement reads so many times the calibration's text


@dataclass(frozen=True)
class Calibration:
    """The calibration text as it will be read: for a causal LM windows of tokens, for an encoder paragraphs."""

    data: str
    samples: int
    sequence_length: int
    batch_size: int


def say_beginning(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """Return the recipe of a causal LM with the tokens that begin every sequence.

    Raises BadInput if it names others than the tokenizer puts there.
    """
    found, named = sequences.begins_with(tokenizer) or sequences.NOTHING, recipe.calibration.begins_with
    if named is not None and named != found:
        raise BadInput(
            f"calibration.begins_with is {named!r} in the recipe, but the tokenizer puts {found} before a "
            "text: leave it out, or give the tokenizer that the recipe was made with"
        )
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"begins_with": found})})


def read_calibration(
    asked: Calibration, tokenizer: PreTrainedTokenizerBase, *, causal: bool, vocabulary: int, seed: int
) -> list[Batch]:
    """Draw from the calibration part of the text, and tokenise; the held-out part is left for evaluation.

    Raises BadInput for too little text, and for token ids beyond the model's `vocabulary`.
    """
    documents = text.open_text(asked.data, part="calibration")
    if causal:
        windows = sequences.windows(tokenizer, documents, asked.sequence_length)
        drawn = text.sample(windows, asked.samples, seed, max(BLOCK_POOL, 4 * asked.samples))
        batches = calibration.causal_batches(drawn, asked.batch_size)
        unit = f"blocks of {asked.sequence_length} tokens"
    else:
        texts = text.sample(text.paragraphs(documents), asked.samples, seed)
        batches = calibration.encoder_batches(tokenizer, texts, asked.sequence_length, asked.batch_size)
        unit = "paragraphs"
    found, needed = calibration.sequences(batches), min(asked.batch_size, asked.samples)
    if found < needed:
        raise BadInput(
            f"{asked.data} holds {found} {unit} for calibration, one batch needs {needed}: "
            "give more text, or lower --batch-size or --sequence-length"
        )
    sequences.check_ids(tokenizer, calibration.largest_id(batches), vocabulary)
    return batches


def refinement_text(asked: Calibration, samples: int | None) -> Calibration:
    """Return what refinement reads of the calibration source: `samples` sequences, or more of them than calibration."""
    return replace(asked, samples=samples or LESSONS * asked.samples)


def held_out(
    asked: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Batch],
    *,
    causal: bool,
    vocabulary: int,
    seed: int,
) -> list[Batch]:
    """Draw sequences of the calibration part that are not in `batches`, an EXAM-th as many.

    Where the source cannot be read twice, or has no more, the last of `batches` serve, and a line says so. Raises
    BadInput for token ids beyond the model's `vocabulary`.
    """
    wanted = -(-calibration.sequences(batches) // EXAM)
    found: list[Batch] = []
    if asked.data != "stdin":
        more = replace(asked, samples=asked.samples + 2 * wanted)
        drawn = read_calibration(more, tokenizer, causal=causal, vocabulary=vocabulary, seed=seed + 1)
        found = calibration.without(drawn, batches, wanted)
    if not found:
        log.warning(
            "%s has no text beside that of the calibration: shared banks are judged on a part of it", asked.data
        )
        return list(batches[-max(1, len(batches) // EXAM) :])
    return found


def read_evaluation(asked: Evaluation, calibration_data: str, causal: bool) -> list[str] | str:
    """Return the documents to judge by, or why there are none.

    Read before anything is computed, since they may not be there. Text that was asked for must be there; the default,
    the held-out part of the calibration source, may be too short.
    """
    if asked.data == "none":
        return "not asked for"
    try:
        documents = list(text.open_text(asked.data or calibration_data, part="all" if asked.data else "held-out"))
        evaluate.check(documents, causal)
    except BadInput as error:
        if asked.data:
            raise
        return f"{error}; --eval-data names other text"
    return documents
