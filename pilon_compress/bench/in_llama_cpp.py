"""Run a GGUF file in llama.cpp, in a process of its own.

python -m pilon_compress.bench.in_llama_cpp FILE THREADS POSITIONS

Imports no torch, which the time to the first token and the memory of llama.cpp do not have.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pilon_compress.bench.answering import serve
from pilon_compress.export.llama_cpp.server import Server


def begin() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Load the file, and return the function that answers a request. Raises CannotLoad."""
    path, threads, positions = sys.argv[1:4]
    server = Server(Path(path), int(threads), int(positions))

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        """Continue `prompt`, a text or tokens, by `count` tokens; seconds are llama.cpp's own."""
        told = server.complete(request["prompt"], request["count"])
        times = told["timings"]
        return {
            "prompt": times["prompt_n"],
            "read": times["prompt_ms"] / 1e3,
            "decode": times["predicted_ms"] / 1e3 / max(1, times["predicted_n"] - 1),
            "tokens": told["tokens"],
            "text": told["content"],
        }

    return answer


if __name__ == "__main__":
    serve(begin)
