"""Run a model as `generate` does, in a process of its own: `python -m pilon_compress.bench.in_torch MODEL THREADS`."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from pilon_compress.bench.answering import serve
from pilon_compress.evaluate.generate import GREEDY, load_to_generate, prompt_ids
from pilon_compress.models import checkpoint


class Stamps(BaseStreamer):
    """Notes when each chosen token is there, in seconds of `time.perf_counter`; the prompt, which comes first, too."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time of the prompt or of a token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing at the end of a text."""


def begin() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Load the model, and return the function that answers a request. Raises BadInput."""
    reference, threads = sys.argv[1:3]
    torch.set_num_threads(int(threads))
    tokenizer = checkpoint.load_tokenizer(reference)
    network: Any = load_to_generate(reference, "cpu")
    network.generation_config.eos_token_id = None  # ends are ignored, as in llama.cpp

    @torch.no_grad()
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        """Continue `prompt`, a text or tokens, by `count` tokens."""
        prompt, count = request["prompt"], request["count"]
        inputs = torch.tensor([prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else prompt])
        stamps = Stamps()
        given = {"attention_mask": torch.ones_like(inputs), "pad_token_id": tokenizer.pad_token_id or 0}
        begun = time.perf_counter()
        out = network.generate(inputs, max_new_tokens=count, num_beams=1, streamer=stamps, **given, **GREEDY)
        _, first, *_, last = [*stamps.times, stamps.times[-1]]
        tokens = out[0, inputs.shape[1] :].tolist()
        return {
            "prompt": inputs.shape[1],
            "read": first - begun,
            "decode": (last - first) / max(1, len(tokens) - 1),
            "tokens": tokens,
            "text": tokenizer.decode(tokens),
        }

    return answer


if __name__ == "__main__":
    serve(begin)
