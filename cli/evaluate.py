"""`pilon-compress eval`: the quality of a model, against the dense one that it came from."""

from pilon_compress.config.evaluation import EvaluateCommand
from pilon_compress.config.tiers import n_hot_of

from .options import configured
from .output import print_json, print_table, say, wait_passively
from .parameters import Json


@configured(EvaluateCommand)
def evaluate(settings: EvaluateCommand, as_json: Json = False) -> None:
    """Evaluate a model: perplexity, KL and agreement for causal LMs, embedding fidelity for encoders.

    pilon-compress eval out/gpt2-half --against gpt2 --data stdlib
    """
    wait_passively()

    from pilon_compress.evaluate.evaluate import evaluate as run
    from pilon_compress.report.formatting import circumstances, quality

    result = run(
        settings.model,
        against=settings.against,
        data=settings.data,
        settings=settings,
        device=settings.device,
        seed=settings.seed,
        n_hot=n_hot_of(settings.tier),
    ).dump()
    if as_json:
        print_json(result)
        return
    rows = [[figure.label, figure.value, figure.dense, figure.meaning] for figure in quality(result)]
    print_table(
        f"{settings.model} against {result['against'] or 'no dense model'}", ["", "PILON", "dense", "meaning"], rows
    )
    say("; ".join(f"{label}: {value}" for label, value in circumstances(result) if label not in ("model", "against")))
