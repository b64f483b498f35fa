"""Evaluate, compare, inspect and time models."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase

from pilon_compress.api.context import ModelLike, Texts, calling, device_of
from pilon_compress.bench import run as benchmarks
from pilon_compress.compare import run as comparisons
from pilon_compress.config.benchmark import BenchCommand, BenchConfig
from pilon_compress.config.comparison import CompareCommand, CompareConfig
from pilon_compress.config.evaluation import EvaluateConfig
from pilon_compress.config.tiers import n_hot_of
from pilon_compress.data.memory import hold as hold_texts
from pilon_compress.evaluate import evaluate as evaluations
from pilon_compress.evaluate.inspect import anatomy
from pilon_compress.models.in_memory import hold, hold_or_none
from pilon_compress.results.benchmark import Benchmark
from pilon_compress.results.comparison import Comparison
from pilon_compress.results.evaluation import Evaluation
from pilon_compress.results.inspection import Inspection


def evaluate(
    model: ModelLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: EvaluateConfig | None = None,
    data: Texts | None = None,
    *,
    against: ModelLike | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a model, and compare its predictions, or embeddings, with those of the dense model `against`.

    model, against   objects of transformers, which do not change, or references. `against` is by default the dense
                     model that `model` was made from, where that can be loaded; encoders need one.
    data             texts, or the name of a source; by default that of the recipe. Where the model was calibrated or
                     trained on it, only its held-out part counts.

    Models are evaluated in float32. Raises BadInput.
    """
    asked = config or EvaluateConfig()
    with (
        calling(progress),
        hold(model, tokenizer) as reference,
        hold_or_none(against) as dense,
        hold_texts(data) as text,
    ):
        return evaluations.evaluate(
            reference,
            against=dense,
            data=text or asked.data,
            settings=asked,
            device=device_of(model, asked.device),
            seed=asked.seed,
            n_hot=n_hot_of(asked.tier),
        )


def compare(
    model: ModelLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: CompareConfig | None = None,
    calibration: Texts | None = None,
    *,
    evaluation: Texts | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Comparison:
    """Compare PILON with published baselines on a dense `model`: same text, same budgets, several calibration draws.

    calibration, evaluation   as for `compress`
    output                    folder for compare.json, a page and a table; an interrupted comparison goes on there

    Raises BadInput.
    """
    asked = config or CompareConfig()
    with (
        calling(progress),
        hold(model, tokenizer) as reference,
        hold_texts(calibration) as text,
        hold_texts(evaluation) as exam,
        TemporaryDirectory(prefix="pilon-compress-") as scratch,
    ):
        given = {
            "model": reference,
            "device": device_of(model, asked.device),
            "calibration": asked.calibration.model_copy(update={} if text is None else {"data": text}),
            "evaluation": asked.evaluation.model_copy(update={} if exam is None else {"data": exam}),
        }
        command = CompareCommand.model_validate({**vars(asked), **given})
        folder = Path(scratch) / "comparison" if output is None else output
        found = comparisons.run(command, folder, overwrite=overwrite)
    return found if output is not None else found.model_copy(update={"output": "", "journal": None})


def inspect(model: ModelLike, *, targets: Sequence[str] = (), ignore: Sequence[str] = ()) -> Inspection:
    """Describe a model: the projections that a conversion would replace, or has replaced, with sizes and costs.

    `targets`, `ignore`: module names, class names or re:REGEX, as in `ConvertConfig`. Of a reference no weights are
    read. Raises BadInput.
    """
    with calling(), hold(model) as reference:
        return anatomy(reference, targets, ignore)


def benchmark(
    model: ModelLike | None = None, config: BenchConfig | None = None, *, plot: str | Path | None = None
) -> Benchmark:
    """Time a PILON `model`, or without one a block of the shape `config.ffn`, beside dense and other variants.

    Variants take turns in this process; speedups are medians of the rounds, with their spread. With `config.against`
    the model's folder is timed against another runtime, in processes of their own. `plot`: an SVG file to draw them
    into. Raises BadInput.
    """
    asked = config or BenchConfig()
    with calling(), hold_or_none(model) as reference:
        command = BenchCommand.model_validate({**vars(asked), "model": reference})
        return benchmarks.benchmark(command, plot)
