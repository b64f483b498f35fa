"""Write the report of a training: `train.html`, one self-contained page, and `curves.png` for the model card.

Every figure comes from train.json and metrics.jsonl, which hold them for programs.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pilon_compress.config.training import TrainRecipe
from pilon_compress.report import formatting, training_curves

Result = Mapping[str, Any]
PAGE, PICTURE = "train.html", "curves.png"
SAMPLES = 4  # samples of text to show, including the first and the last
DIAGNOSTICS = {
    "composition_entropy": "Entropy of a layer",
    "primitive_entropy": "Entropy of a bank",
    "primitive_gini": "Gini of a bank",
    "utilisation": "Utilisation",
    "dead_share": "Dead primitives ÷ all",
    "router_entropy": "Entropy of a router",
    "load_cv": "Deviation of the experts' load ÷ its mean",
    "load_max": "Busiest expert ÷ the mean",
    "expert_similarity": "Cosine of two experts",
    "zero_share": "Ternary weights 0 ÷ all",
    "flipped_share": "Ternary weights changed since the evaluation before ÷ all",
}


def write_pages(result: Result, recipe: TrainRecipe, lines: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write the page and the picture of a training into `folder`; equal figures give equal bytes."""
    plot, picture = training_curves.both(lines, marks(recipe, lines))
    (folder / PICTURE).write_bytes(picture)
    (folder / PAGE).write_text(page(result, recipe, lines, plot), encoding="utf-8", newline="\n")


def page(result: Result, recipe: TrainRecipe, lines: Sequence[Mapping[str, Any]], plot: str = "") -> str:
    """Return the page: no script, nothing loaded from elsewhere, all text from data and models escaped.

    `plot`: the curves as an `<svg>` element, where they are drawn already.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": formatting.number, "short": formatting.short_count}
    source = resources.files("pilon_compress.report").joinpath("templates/training.html.j2").read_text(encoding="utf-8")
    measured = [line for line in lines if {"utilisation", "zero_share", "load_cv"} & set(line)]
    return environment.from_string(source).render(
        result=result,
        recipe=recipe,
        title=title(recipe),
        description=description(recipe),
        plot=Markup(plot or training_curves.svg(lines, marks(recipe, lines))),
        marks=[label for _, label in marks(recipe, lines)],
        main_metric=main_metric(result),
        best=formatting.number(result["best_val_perplexity"]) if "best_val_perplexity" in result else "",
        cards=cards(result),
        diagnostics=[(label, measured[0].get(key), measured[-1].get(key)) for key, label in DIAGNOSTICS.items()]
        if measured
        else [],
        samples=samples(lines),
    )


def title(recipe: TrainRecipe) -> str:
    """Return the name of the run."""
    if recipe.start is not None:
        return recipe.start
    names = {"pilon": "PILON", "lowrank": "Low-rank", "dense": "Dense"}
    return f"{names[recipe.ffn.kind]} language model from scratch"


def description(recipe: TrainRecipe) -> str:
    """Return the part of a sentence that describes the training, to follow the name."""
    ternary = ", with ternary feed-forward weights and 8-bit activations"
    exits = ", and given exit gates, by which tokens skip feed-forward blocks"
    return _training(recipe) + (ternary if recipe.ternary.enabled else "") + (exits if recipe.exits.enabled else "")


def _training(recipe: TrainRecipe) -> str:
    if recipe.task == "heal":
        return f"was distilled from {recipe.teacher or 'the dense model that it was converted from'}"
    if recipe.task == "sft":
        return "was fine-tuned on conversations"
    if recipe.task == "gates":
        return "was given exit gates, by which tokens skip feed-forward blocks; its weights did not change"
    if recipe.ffn.primitive == "neurons" and recipe.ffn.kind == "pilon":
        shared = ", of neurons that layers share" if recipe.ffn.shares else ""
        return f"was trained from random weights, its feed-forward blocks narrower than the dense ones{shared}"
    kinds = {
        "pilon": "its feed-forward projections composed from banks of primitives that layers share",
        "lowrank": "its feed-forward projections low-rank products of each layer's own",
        "dense": "without compression",
    }
    begun = f"dense for the first {recipe.ffn.dense_until:.0%} of its tokens and then " if recipe.warm else ""
    return f"was trained from random weights, {begun}{kinds[recipe.ffn.kind]}"


def marks(recipe: TrainRecipe, lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, str]]:
    """Return (tokens, label) of the changes during the training."""
    total = max((line["tokens"] for line in lines), default=0)
    changes = [mark for section in recipe.research.sections.values() for mark in section.marks()]
    if 0 < recipe.weight_decay_ends < 1:
        changes.append((recipe.weight_decay_ends, "second stage"))
    return [(share * total, label) for share, label in sorted(changes)]


def main_metric(result: Result) -> formatting.Metric:
    """Return the metric of the run: validation perplexity, or an encoder's cosine to its teacher."""
    if "val_cosine" in result:
        return formatting.Metric(
            "Cosine to the teacher", formatting.number(result["val_cosine"]), "mean over paragraphs"
        )
    return formatting.Metric(
        "Validation perplexity", formatting.number(result["val_perplexity"]), "exp of the mean loss per token"
    )


def cards(result: Result) -> list[formatting.Metric]:
    """Return the most important figures."""
    name, sizes = formatting.replaced_of(result)
    exits = result.get("exits")
    skipping = "of the feed-forward work, at exit gates, for {} of the perplexity"
    return [
        main_metric(result),
        formatting.Metric(
            "Tokens", formatting.short_count(result["tokens"]), f"{formatting.number(result['steps'])} steps"
        ),
        formatting.Metric(
            "Tokens per second",
            formatting.number(round(result["tokens_per_second"])),
            f"{result['processes']} × {result['device']}",
        ),
        formatting.Metric("Parameters", formatting.short_count(result["parameters"]), "of the whole model"),
        formatting.Metric(
            f"{name} stored", formatting.number(sizes["stored_ratio"]), f"parameters ÷ the dense {name}'s"
        ),
        formatting.Metric(f"{name} MACs", formatting.number(sizes["mac_ratio"]), f"per token ÷ the dense {name}'s"),
        *(
            [
                formatting.Metric(
                    "Skipped", f"{exits['skipped']:.1%}", skipping.format(f"{exits['perplexity_increase']:.2%}")
                )
            ]
            if exits
            else []
        ),
    ]


def samples(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """Return (step, text) of at most SAMPLES samples, evenly spaced from the first to the last."""
    texts = [(line["step"], line["sample"]) for line in lines if line.get("sample")]
    if len(texts) <= SAMPLES:
        return texts
    return [texts[round(index * (len(texts) - 1) / (SAMPLES - 1))] for index in range(SAMPLES)]
