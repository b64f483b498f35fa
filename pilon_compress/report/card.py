"""Write the model card, README.md beside the weights, of converted, trained and packed models.

Metadata is `huggingface_hub.ModelCardData`, which the hub reads, including evaluation results. Every figure comes from
the report of the command that made the model; the card states if quality was not measured.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pilon_compress.config.training import TrainRecipe
from pilon_compress.nn.formats.registry import FORMATS
from pilon_compress.report import formatting
from pilon_compress.report.card_sections import (
    costs,
    introduction,
    limits,
    losses,
    quality,
    training_figures,
    training_limits,
)
from pilon_compress.report.markdown import bullets, code, fence, table
from pilon_compress.report.training_page import PAGE, PICTURE, description, title

Report = Mapping[str, Any]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
INSTALL = "pip install torch && pip install -e ."  # as the README says: the package is on no index
TASKS = {"causal": "text-generation", "encoder": "feature-extraction"}
CLASSES = {"causal": "AutoModelForCausalLM", "encoder": "AutoModel"}


def conversion_card(report: Report) -> str:
    """Write the card of a converted model from its report (the contents of report.json)."""
    evaluation = report["evaluation"] or {}
    kind = evaluation.get("kind")
    metadata = _metadata(
        report["output"],
        kind,
        ["pilon", "compressed"],
        (report["source"],),
        _results({key: evaluation.get(key) for key in formatting.QUALITY}, kind, evaluation.get("data", "")),
    )
    sections = [
        f"# {code(report['source'])}, compressed",
        introduction(report),
        "## Measured",
        costs(report),
        *quality(report),
        *losses(report),
        "## Load",
        "Any Auto class that fits the dense model works.",
        *_loading(report["output"], kind),
        *_reproduction(report, f"{formatting.number(report['seconds'])} s, at most {_gib(report)} GiB of memory"),
        "## Limits",
        bullets(limits(report)),
    ]
    return _written(metadata, sections)


def training_card(result: Report, recipe: TrainRecipe, causal: bool = True, dense: str | None = None) -> str:
    """Write the card of a trained model from its result (the contents of train.json).

    `causal`: True for a language model. `dense`: the dense model behind the one that training started from.
    """
    kind, data = "causal" if causal else "encoder", recipe.data.validation or result["data"]
    measured = {key: result.get(f"val_{key}") for key in ("perplexity", "cosine")}
    metadata = _metadata(
        result["output"],
        kind,
        ["pilon"] if "model" in result else ["pilon-compress"],
        (recipe.start, dense),
        _results(measured, kind, data),
    )
    figures, validation = training_figures(result), recipe.data.validation
    text = code(validation) if validation else "documents of the same source that were not trained on"
    sections = [
        f"# {title(recipe) if recipe.start is None else code(title(recipe)) + ', trained'}",
        f"This model {description(recipe)}, on {code(result['data'])}. The full report is `{PAGE}`, its numbers are in "
        "`train.json` and `metrics.jsonl`.",
        "## Measured",
        f"{table(['', 'This model', ''], figures)}\n\nEvaluated on {text}.",
        *([] if recipe.task == "gates" else [f"![Loss, perplexity and rates over the training]({PICTURE})"]),
        "## Load",
        *_loading(result["output"], kind, pilon="model" in result),
        *_reproduction(
            result,
            f"{formatting.number(result['seconds'])} s of training on {result['processes']} × {code(result['device'])}",
        ),
        "## Limits",
        bullets(training_limits(result, recipe)),
    ]
    return _written(metadata, sections)


def packed_card(result: Report) -> str:
    """Write the card of a packed model.

    `result`: `source`, `dense` (the dense model's reference, or None), `output`, `kind`, `formats` of the weights,
    `ffn` and `model` sizes, `max_logit_difference`, `rest` and `rest_relative_error` where the rest was rounded,
    `pilon_compress`.
    """
    name = Path(result["source"]).name
    rest_error = result.get("rest_relative_error")
    rows = [
        [part, *(formatting.number(result[key][f"{over}_ratio"]) for over in ("stored", "bytes", "mac"))]
        for key, part in formatting.parts_of(result)
    ]
    sections = [
        f"# {code(name)}, packed",
        f"Feed-forward weights: {'; '.join(FORMATS[one].about for one in result['formats'])}. Over the dense model in "
        "bfloat16:",
        table(["", "stored parameters", "bytes", "MACs"], rows),
        f"Largest difference of outputs to the model before packing: {result['max_logit_difference']:.3g}.",
        *(
            []
            if rest_error is None
            else [
                f"Attention, head and token embeddings are in {result['rest']}; rounding them changed the outputs by "
                f"{rest_error:.3g} of their norm."
            ]
        ),
        "## Load",
        *_loading(result["output"], result["kind"]),
        f"Made by pilon-compress {result['pilon_compress']} from {code(name)}.",
    ]
    bases = (result["source"], result["dense"])
    return _written(_metadata(result["output"], result["kind"], ["pilon", "packed"], bases, []), sections)


def _written(metadata: ModelCardData, sections: Sequence[str]) -> str:
    body = "\n\n".join(sections)
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n"))


def _metadata(
    output: str, kind: str | None, tags: list[str], bases: Sequence[str | None], results: list[EvalResult]
) -> ModelCardData:
    """Return the card's metadata. `bases`: references of the models behind it; the first hub id is its base_model.

    The hub refuses a `base_model` that is not one of its ids.
    """
    fields: dict[str, Any] = {"library_name": "transformers", "tags": tags}
    if kind in TASKS:
        fields["pipeline_tag"] = TASKS[kind]
    if hub_ids := [base for base in bases if base and is_hub_id(base)]:
        fields["base_model"] = hub_ids[0]
    if results:
        fields |= {"model_name": " ".join(Path(output).name.split()) or "model", "eval_results": results}
    return ModelCardData(**fields)


def is_hub_id(reference: str) -> bool:
    """Return True if `reference` may be the id of a model on the hub and is not a local folder."""
    return bool(HUB_ID.fullmatch(reference)) and not os.path.isdir(reference) and not reference.startswith(".")


def _results(figures: Mapping[str, float | None], kind: str | None, data: str) -> list[EvalResult]:
    """Return evaluation results for the hub, of a model of `kind` on the text source `data`; [] for an unknown kind."""
    if kind not in TASKS:
        return []
    place: dict[str, Any] = {"dataset_type": "text", "dataset_name": data}
    if data.startswith("hub:"):
        repository, *parts = data.removeprefix("hub:").partition(" ")[0].split(":")  # before "(held-out part)"
        place = {"dataset_type": repository, "dataset_name": repository}
        place |= {name: part for name, part in zip(("dataset_config", "dataset_split"), parts, strict=False) if part}
    return [
        EvalResult(
            task_type=TASKS[kind], metric_type=key, metric_name=formatting.QUALITY[key][0], metric_value=value, **place
        )
        for key, value in figures.items()
        if value is not None and math.isfinite(value)
    ]


def _loading(output: str, kind: str | None, pilon: bool = True) -> list[str]:
    """Return code blocks that install the libraries and load the folder `output`."""
    auto = CLASSES.get(kind or "", "AutoModel")
    lines = [
        *(["import pilon_compress  # registers the format with transformers"] if pilon else []),
        f"from transformers import {auto}, AutoTokenizer\n",
        f"folder = {output!r}  # the path at which it was written",
        f"model = {auto}.from_pretrained(folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]
    install = f"{INSTALL}  # in a checkout of pilon-compress" if pilon else "pip install torch transformers"
    return [fence(install, "sh"), fence("\n".join(lines), "python")]


def _reproduction(report: Report, cost: str) -> list[str]:
    """Return the section with the command and the recipe that make the model."""
    return [
        "## Reproduce",
        f"pilon-compress {report['pilon_compress']}, {cost}:",
        *([fence(report["command"], "sh")] if report["command"] else []),
        "The complete recipe:",
        fence(report["recipe"], "yaml"),
    ]


def _gib(report: Report) -> str:
    return formatting.number(report["peak_rss_gib"])
