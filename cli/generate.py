"""`pilon-compress generate`: a first look at what a causal LM says."""

from typing import Annotated

import typer

from pilon_compress.errors import BadInput

from .output import print_json


def generate(
    model: Annotated[str, typer.Argument(help="PILON or dense causal LM.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to answer or continue; '-' reads stdin.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add, at most.")] = 64,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 decodes greedily [default: 0; 1 with --top-k or --top-p]."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many most probable tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the most probable tokens that make up this share.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Divide the logits of tokens that are there already.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    system: Annotated[str | None, typer.Option(help="System message before the prompt (chat models).")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it stands, even if the model has a chat template.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Continue a prompt, or answer it if the model has a chat template; text appears as it is generated.

    pilon-compress generate out/gpt2-half --prompt "The module provides"
    """
    from pilon_compress.evaluate.generate import complete

    text = _read_stdin() if prompt == "-" else prompt
    if not text:
        raise BadInput("the prompt is empty")
    out = complete(
        model,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        raw=raw,
        system=system,
        device=device,
        stream=None if as_json else _print_piece,
    )
    if as_json:
        print_json(
            {
                "model": model,
                "prompt": text,
                "completion": out.text,
                "tokens": out.tokens,
                "stop": out.stop,
                "chat": out.chat,
            }
        )
    else:
        print()


def _print_piece(piece: str) -> None:
    print(piece, end="", flush=True)


def _read_stdin() -> str:
    import sys

    if sys.stdin is None:
        raise BadInput("there is no standard input to read the prompt from")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"the prompt on stdin is not UTF-8 text (byte {error.start})") from None
