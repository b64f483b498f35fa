"""The texts of a conversion: what it is calibrated on, what a refinement learns from, and what judges the result."""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from pilon_compress.convert.prepare import Job
from pilon_compress.data import calibration, sequences, text
from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.evaluate import evaluate
from pilon_compress.models.task import vocabulary

BLOCK_POOL = 1024  # blocks of text that calibration draws from, or four times as many as it draws
LESSONS = 8  # refinement reads so many times the calibration's text


def say_beginning(job: Job, tokenizer: PreTrainedTokenizerBase) -> Job:
    """The job with the tokens that begin every sequence in its recipe. Raises BadInput if that has named others."""
    found, named = sequences.begins_with(tokenizer) or sequences.NOTHING, job.recipe.calibration.begins_with
    if not job.causal:  # texts of an encoder are framed by the tokenizer alone
        return job
    if named is not None and named != found:
        raise BadInput(
            f"calibration.begins_with is {named!r} in the recipe, but the tokenizer puts {found} before a "
            "text: leave it out, or give the tokenizer that the recipe was made with"
        )
    calibration = job.recipe.calibration.model_copy(update={"begins_with": found})
    return replace(job, recipe=job.recipe.model_copy(update={"calibration": calibration}))


def read_calibration(job: Job, tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    """Draw from the calibration part of the text, and tokenise; the held-out part is left for evaluation."""
    asked = job.calibration
    documents = text.open_text(asked.data, part="calibration")
    if job.causal:
        windows = sequences.windows(tokenizer, documents, asked.sequence_length)
        drawn = text.sample(windows, asked.samples, job.recipe.seed, max(BLOCK_POOL, 4 * asked.samples))
        batches = calibration.causal_batches(drawn, asked.batch_size)
        unit = f"blocks of {asked.sequence_length} tokens"
    else:
        texts = text.sample(text.paragraphs(documents), asked.samples, job.recipe.seed)
        batches = calibration.encoder_batches(tokenizer, texts, asked.sequence_length, asked.batch_size)
        unit = "paragraphs"
    found, needed = calibration.sequences(batches), min(asked.batch_size, asked.samples)
    if found < needed:
        raise BadInput(
            f"{asked.data} holds {found} {unit} for calibration, one batch needs {needed}: "
            "give more text, or lower --batch-size or --sequence-length"
        )
    sequences.check_ids(tokenizer, calibration.largest_id(batches), vocabulary(job.config))
    return batches


def read_lessons(job: Job, tokenizer: PreTrainedTokenizerBase, batches: list[Batch]) -> list[Batch]:
    """Return the refinement batches: more of the calibration source, if it can be read twice."""
    asked = job.calibration
    if not job.recipe.refine.steps or asked.data == "stdin":
        return batches
    samples = job.recipe.refine.samples or LESSONS * asked.samples
    return read_calibration(replace(job, calibration=replace(asked, samples=samples)), tokenizer)


def read_evaluation(job: Job) -> list[str] | str:
    """The documents to judge by, or why there are none. Read before anything is computed, since they may not be there.

    Text that was asked for must be there; the default, the held-out part of the calibration source, may be too short.
    """
    asked = job.recipe.evaluation
    if asked.data == "none":
        return "not asked for"
    try:
        documents = list(text.open_text(asked.data or job.calibration.data, part="all" if asked.data else "held-out"))
        evaluate.check(documents, job.causal)
    except BadInput as error:
        if asked.data:
            raise
        return f"{error}; --eval-data names other text"
    return documents
