"""`pilon-compress generate`: a first look at what a causal LM says."""

import sys
from typing import Annotated

import typer

from pilon_compress.config.generation import GenerateConfig
from pilon_compress.errors import BadInput

from .options import configured
from .output import print_json
from .parameters import Json

Prompt = Annotated[
    str, typer.Option("--prompt", "-p", metavar="PROMPT", help="Text to answer or continue; - reads it from stdin.")
]


@configured(GenerateConfig)
def generate(settings: GenerateConfig, prompt: Prompt, as_json: Json = False) -> None:
    """Continue a prompt, or answer it if the model has a chat template; text appears as it is generated.

    pilon-compress generate out/gpt2-half --prompt "The module provides"
    """
    from pilon_compress.evaluate.generate import complete

    text = _read_stdin() if prompt == "-" else prompt
    out = complete(settings, text, stream=None if as_json else _print_piece)
    if not as_json:
        print()
        return
    facts = {"completion": out.text, "tokens": out.tokens, "stop": out.stop, "chat": out.chat}
    print_json({"model": settings.model, "prompt": text, **facts})


def _print_piece(piece: str) -> None:
    """Print a piece of the completion as soon as it is there."""
    print(piece, end="", flush=True)


def _read_stdin() -> str:
    """Return all of standard input as text. Raises BadInput."""
    if sys.stdin is None:
        raise BadInput("there is no standard input to read the prompt from")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"the prompt on stdin is not UTF-8 text (byte {error.start})") from None
