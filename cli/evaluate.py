"""`pilon-compress eval`: the figures that judge a model, against the dense one it came from."""

from typing import Annotated

import typer

from .output import print_json, print_table, say, wait_passively


def evaluate(
    model: Annotated[str, typer.Argument(help="PILON model folder (or any dense model).")],
    against: Annotated[
        str | None, typer.Option(help="The dense model; default: the source named in the folder's recipe.yaml.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text source, as for convert; default: what the folder's recipe names, else WikiText-2 or stdlib."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Texts (encoders) or windows (LMs); default: 500 / all.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of context per window (LMs).")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens by which windows advance (LMs); default: the window.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per batch.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the sample of texts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Evaluate a model: perplexity, KL and agreement for causal LMs, embedding fidelity for encoders.

    pilon-compress eval out/gpt2-half --against gpt2 --data stdlib
    """
    wait_passively()

    from pilon_compress.config import conversion

    fields = {"samples": samples, "window": window, "stride": stride, "batch_size": batch_size}
    settings = conversion.evaluation({key: value for key, value in fields.items() if value is not None})

    from pilon_compress.evaluate.evaluate import evaluate as run
    from pilon_compress.report.formatting import circumstances, quality

    result = run(model, against=against, data=data, settings=settings, device=device, seed=seed)
    if as_json:
        print_json(result)
        return
    rows = [[figure.label, figure.value, figure.dense, figure.meaning] for figure in quality(result)]
    print_table(f"{model} against {result['against'] or 'nothing'}", ["", "PILON", "dense", "what it is"], rows)
    say("; ".join(f"{label}: {value}" for label, value in circumstances(result) if label not in ("model", "against")))
