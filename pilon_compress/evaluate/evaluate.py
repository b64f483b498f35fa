"""Evaluate a model by the metrics of its kind, on text that it was not calibrated on."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pilon_compress.config import conversion
from pilon_compress.data import text
from pilon_compress.data.text import DEFAULT_ENCODER, EVALUATION_LM
from pilon_compress.errors import BadInput
from pilon_compress.evaluate import embeddings, perplexity
from pilon_compress.models import checkpoint
from pilon_compress.models.provenance import lineage
from pilon_compress.results.evaluation import Evaluation

ENCODER_TEXTS = 500  # paragraphs that an encoder is evaluated on
EVALUATED = 2**14  # tokens scored by the evaluation after a conversion; `eval` scores all of the text


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    against: PreTrainedModel | None,
    settings: conversion.Evaluation,
    seed: int = 0,
) -> Evaluation:
    """Return perplexity and related metrics of a causal LM, or an encoder's fidelity to `against`.

    Raises BadInput for an encoder without `against`, and for settings that do not apply to the kind.
    """
    settings.check_kind(checkpoint.is_causal(model.config))
    if checkpoint.is_causal(model.config):
        return perplexity.measure(
            model,
            tokenizer,
            documents,
            against=against,
            window=settings.window,
            stride=settings.stride,
            batch_size=settings.batch_size,
            max_windows=settings.samples,
        )
    if against is None:
        raise BadInput("an encoder is evaluated by its fidelity to the dense model: name that model with --against")
    texts = text.sample(text.paragraphs(documents), settings.samples or ENCODER_TEXTS, seed)
    return embeddings.measure(model, against, tokenizer, texts, batch_size=settings.batch_size)


def affordable(settings: conversion.Evaluation, model: PreTrainedModel) -> conversion.Evaluation:
    """Return `settings` with windows for at most EVALUATED tokens of a language model, unless they set `samples`."""
    if settings.samples is not None or not checkpoint.is_causal(model.config):
        return settings
    window = settings.window or perplexity.default_window(model)
    return settings.model_copy(update={"samples": max(1, EVALUATED // window)})


def check(documents: Sequence[str], causal: bool) -> None:
    """Raise BadInput if the text is too short for an evaluation."""
    if not causal:
        embeddings.check(list(text.paragraphs(documents)))


def evaluate(
    model: str,
    *,
    against: str | None = None,
    data: str | None = None,
    settings: conversion.Evaluation | None = None,
    device: str = "auto",
    seed: int = 0,
    n_hot: float | None = None,
) -> Evaluation:
    """Evaluate the model at `model` (PILON or dense), and compare it with a dense model where one is known.

    `against` defaults to the dense model in the folder's recipe.yaml. `data` is a text source; the default is the
    recipe's evaluation or calibration source, and without a recipe WikiText-2 (encoders: stdlib). Where it overlaps a
    source of calibration or training, only the held-out part is used, and the result says so. Raises BadInput for
    models and text that cannot be read, and for an encoder whose dense model is unknown. `n_hot`: see `load_model`.
    """
    origin = lineage(checkpoint.resolve(model))
    against = against or origin.dense
    causal = checkpoint.is_causal(checkpoint.load_config(model))
    if not causal and against is None:  # before the models are loaded
        raise BadInput(f"{model} is an encoder, evaluated by its fidelity to a dense model: name that with --against")
    data = data or origin.evaluation or (EVALUATION_LM if causal else DEFAULT_ENCODER)
    seen = any(_overlap(data, source) for source in origin.texts)
    documents = list(text.open_text(data, part="held-out" if seen else "all"))
    pilon = checkpoint.load_model(model, dtype="float32", device=device, share=True, n_hot=n_hot)
    dense = checkpoint.load_model(against, dtype="float32", device=device, share=True) if against else None
    figures = measure(
        pilon,
        checkpoint.load_tokenizer(model),
        documents,
        against=dense,
        settings=settings or conversion.Evaluation(),
        seed=seed,
    )
    about = {"model": model, "against": against, "data": data + (" (held-out part)" if seen else "")}
    return figures.model_copy(update=about)


def _overlap(data: str, source: str) -> bool:
    """Return True if two sources may share documents: equal ones, or `stdlib` and one of its halves."""
    return data == source or (
        {data, source} & {"stdlib"} != set() and data.startswith("stdlib") and source.startswith("stdlib")
    )
