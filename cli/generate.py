"""`pilon-compress generate`: a first look at what a causal LM says."""

from typing import Annotated

import typer

from pilon_compress.errors import BadInput

from .output import print_json


def generate(
    model: Annotated[str, typer.Argument(help="PILON or dense causal LM.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; '-' reads stdin.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus of the sampled distribution.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Continue a prompt, with compositions folded for speed.

    pilon-compress generate out/gpt2-half --prompt "The module provides"
    """
    import sys

    from pilon_compress.measure.sample import continue_text

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise BadInput("the prompt is empty")
    added = continue_text(
        model, text, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, device=device
    )
    print_json({"model": model, "prompt": text, "completion": added}) if as_json else print(text + added)
