"""A GGUF file that llama.cpp runs, by the wheel xllamacpp. Imports no torch: processes of their own begin with it."""

import json
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class CannotLoad(RuntimeError):
    """Raised where llama.cpp refuses a file."""


def available() -> bool:
    """Return True where llama.cpp is installed."""
    return find_spec("xllamacpp") is not None


class Server:
    """A GGUF file that llama.cpp has loaded, on the CPU, with its own defaults but for one sequence at a time.

    threads: for reading and for decoding   context: positions   embeds: compute embeddings, not text
    No run warms it up, and no prompt of an earlier request is kept. Raises CannotLoad.
    """

    def __init__(self, path: Path, threads: int = 1, context: int = 512, embeds: bool = False) -> None:
        import xllamacpp

        given = xllamacpp.CommonParams()
        given.model.path, given.n_ctx, given.n_parallel, given.n_gpu_layers = str(path), context, 1, 0
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = threads
        given.warmup, given.verbosity, given.embedding, given.cache_ram_mib = False, -1, embeds, 0
        begun = time.perf_counter()
        try:
            self.server = xllamacpp.Server(given)
        except RuntimeError as error:
            raise CannotLoad(f"llama.cpp cannot load {path.name}") from error
        self.load_seconds = time.perf_counter() - begun

    def post(self, path: str, asked: dict[str, Any]) -> Any:
        """Ask llama.cpp's server."""
        request = urllib.request.Request(  # noqa: S310 - its own loopback address
            self.server.listening_address + path, json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:  # noqa: S310
            return json.load(answer)

    def complete(self, prompt: str | list[int], count: int) -> dict[str, Any]:
        """Return the server's answer to a text or tokens: `count` greedy tokens, ends ignored, and their timings."""
        asked = {"prompt": prompt, "n_predict": count, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        answer: dict[str, Any] = self.post("/completion", {**asked, "return_tokens": True})
        return answer
