"""What a training leaves for people: `train.html`, one self-contained page, and `curves.png` for the model card.

Every figure comes from train.json and metrics.jsonl, which hold them for programs.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pilon_compress.config.training import TrainRecipe
from pilon_compress.report import curves, formatting

Result = Mapping[str, Any]
PAGE, PICTURE = "train.html", "curves.png"
SAMPLES = 4  # samples of text to show, the first and the last among them
WORDS = {
    "composition_entropy": "Entropy of a layer",
    "primitive_entropy": "Entropy of a bank",
    "primitive_gini": "Gini of a bank",
    "utilisation": "Utilisation",
    "dead_share": "Dead primitives ÷ all",
    "zero_share": "Digits 0 ÷ all",
    "flipped_share": "Digits that changed since the look before ÷ all",
}


def write_pages(result: Result, recipe: TrainRecipe, lines: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write the page and the picture of a training into `folder`: the same bytes for the same figures."""
    drawn = marks(recipe, lines)
    (folder / PICTURE).write_bytes(curves.png(lines, drawn))
    (folder / PAGE).write_text(page(result, recipe, lines), encoding="utf-8", newline="\n")


def page(result: Result, recipe: TrainRecipe, lines: Sequence[Mapping[str, Any]]) -> str:
    """The page: no script, nothing loaded from elsewhere, everything that comes from text or models escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": formatting.number, "short": formatting.short_count}
    source = resources.files("pilon_compress.report").joinpath("templates/training.html.j2").read_text(encoding="utf-8")
    health = [line for line in lines if "utilisation" in line or "zero_share" in line]
    return environment.from_string(source).render(
        result=result,
        recipe=recipe,
        title=title(recipe),
        what=what(recipe),
        plot=Markup(curves.svg(lines, marks(recipe, lines))),
        marks=[label for _, label in marks(recipe, lines)],
        judged=judged(result),
        best=formatting.number(result["best_val_perplexity"]) if "best_val_perplexity" in result else "",
        cards=cards(result),
        health=[(word, health[0].get(key), health[-1].get(key)) for key, word in WORDS.items()] if health else [],
        samples=samples(lines),
    )


def title(recipe: TrainRecipe) -> str:
    """What the run is called."""
    if recipe.start is not None:
        return recipe.start
    names = {"pilon": "PILON", "lowrank": "Low-rank", "dense": "Dense"}
    return f"{names[recipe.ffn.kind]} language model from scratch"


def what(recipe: TrainRecipe) -> str:
    """What was done, as the part of a sentence that follows the name."""
    digits = ", with feed-forward weights of ternary digits and 8-bit activations"
    return _learnt(recipe) + (digits if recipe.ternary.enabled else "")


def _learnt(recipe: TrainRecipe) -> str:
    if recipe.task == "heal":
        return f"learnt from {recipe.teacher or 'the dense model that it was converted from'}"
    if recipe.task == "sft":
        return "was fine-tuned on conversations"
    if recipe.ffn.matrices and recipe.ffn.kind != "dense":
        return "was trained from random weights, its feed-forward blocks narrower than the dense ones"
    kinds = {
        "pilon": "its feed-forward projections composed from banks of primitives that layers share",
        "lowrank": "its feed-forward projections low-rank products, each layer's its own",
        "dense": "without compression",
    }
    begun = f"dense for the first {recipe.ffn.dense_until:.0%} of its tokens and then " if recipe.warm else ""
    return f"was trained from random weights, {begun}{kinds[recipe.ffn.kind]}"


def marks(recipe: TrainRecipe, lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, str]]:
    """Where in the training something changed, in tokens, and what."""
    total = max((line["tokens"] for line in lines), default=0)
    found = [mark for section in recipe.research.sections.values() for mark in section.marks()]
    if 0 < recipe.weight_decay_ends < 1:
        found.append((recipe.weight_decay_ends, "second stage"))
    return [(share * total, label) for share, label in sorted(found)]


def judged(result: Result) -> formatting.Figure:
    """What the run is judged by: perplexity, or an encoder's likeness to its teacher."""
    if "val_cosine" in result:
        return formatting.Figure(
            "Cosine to the teacher", formatting.number(result["val_cosine"]), "mean over paragraphs"
        )
    return formatting.Figure(
        "Validation perplexity", formatting.number(result["val_perplexity"]), "exp of the mean loss per token"
    )


def cards(result: Result) -> list[formatting.Figure]:
    """The figures that matter most."""
    ffn = result["ffn"]
    return [
        judged(result),
        formatting.Figure(
            "Tokens", formatting.short_count(result["tokens"]), f"{formatting.number(result['steps'])} steps"
        ),
        formatting.Figure(
            "Tokens per second",
            formatting.number(round(result["tokens_per_second"])),
            f"{result['processes']} × {result['device']}",
        ),
        formatting.Figure("Parameters", formatting.short_count(result["parameters"]), "of the whole model"),
        formatting.Figure("FFN stored", formatting.number(ffn["stored_ratio"]), "parameters ÷ the dense FFN's"),
        formatting.Figure("FFN MACs", formatting.number(ffn["mac_ratio"]), "per token ÷ the dense FFN's"),
    ]


def samples(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """(step, text) of some samples, evenly spaced from the first to the last."""
    found = [(line["step"], line["sample"]) for line in lines if line.get("sample")]
    if len(found) <= SAMPLES:
        return found
    return [found[round(index * (len(found) - 1) / (SAMPLES - 1))] for index in range(SAMPLES)]
