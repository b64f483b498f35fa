"""Run a GGUF file in llama.cpp, by the wheel xllamacpp, to compare tokens and log-probabilities with transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pilon_compress.export.llama_cpp.server import CannotLoad, Server, available
from pilon_compress.export.verify import ExportFailed

__all__ = ["available"]  # re-exported

TEXT = (
    "The committee met on 12 March 1987 to review the results; nobody had expected that the cost of 3,400 pounds "
    "would rise so quickly.\n\nIn the end, they didn't agree: \"It's a question of time,\" said the chairman."
)
LIKELIEST = 20  # tokens whose log-probabilities are compared
PLACES = 4  # prefixes of the text
TOLERANCES = {"f32": 0.02, "f16": 0.05, "bf16": 0.2} | dict.fromkeys(("q8_0", "q4_0", "q4_k_m", "tq1_0", "tq2_0"), 0.3)
"""Largest difference in log-probability to the file's weights in transformers, over the deviation of these.

SmolLM2 has 0.13 in q4_0 and 0.08 in q8_0, since llama.cpp rounds the inputs of quantised products, 0.002 in f16;
weights in another order have 1.6 and more."""
EMBEDDING_TOLERANCES = {"f32": 1e-3, "f16": 5e-3, "bf16": 2e-2, "q8_0": 2e-2, "q4_0": 2e-2, "q4_k_m": 2e-2}
"""The same of a number of a normalised embedding."""


@dataclass(frozen=True)
class Verified:
    """A file in llama.cpp, compared with the model that it was written from.

    difference: largest one of outputs to the model with the file's weights, which must not exceed `allowed`
    rounding: the same to the model as it was, so that it has what the type costs
    """

    difference: float
    rounding: float
    allowed: float
    load_seconds: float
    tokens_agree: bool


class Runtime(Server):
    """A GGUF file that llama.cpp has loaded, to be compared with transformers. Raises ExportFailed where it cannot."""

    def __init__(self, path: Path, threads: int = 1, context: int = 512, embeds: bool = False) -> None:
        try:
            super().__init__(path, threads, context, embeds)
        except CannotLoad as error:
            raise ExportFailed(str(error)) from error

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Return the tokens of a text; with `special`, also those that a sequence begins and ends with."""
        return [int(one) for one in self.post("/tokenize", {"content": text, "add_special": special})["tokens"]]

    def agrees(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Return True if llama.cpp splits a text as `tokenizer` does, and begins and ends it alike."""
        asked = ((special, tokenizer(TEXT, add_special_tokens=special)["input_ids"]) for special in (False, True))
        return all(self.tokenize(TEXT, special) == expected for special, expected in asked)

    def likeliest(self, tokens: list[int]) -> dict[int, float]:
        """Return the log-probabilities of the likeliest next tokens, by id."""
        asked = {"prompt": tokens, "n_predict": 1, "n_probs": LIKELIEST, "temperature": 0, "cache_prompt": False}
        # An end, or half of a character, that is chosen comes without log-probabilities, so the prompt's first token is
        # chosen; those that are told are from before the bias.
        asked["logit_bias"] = [[tokens[0], 1000.0]]
        (first,) = self.post("/completion", asked)["completion_probabilities"]
        return {int(one["id"]): float(one["logprob"]) for one in first["top_logprobs"]}

    def embedding(self, text: str) -> list[float]:
        """Return the normalised embedding of a text."""
        (found,) = self.post("/embedding", {"content": text})
        return [float(one) for one in found["embedding"][0]]


@torch.no_grad()
def verify_encoder(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    pooling: str,
    as_written: Callable[[], None],
) -> Verified:
    """Compare the embedding of a text in llama.cpp with that of the `model` that the file was written from.

    as_written: gives the model, in place, the weights that the file has
    """
    running = Runtime(path, embeds=True)
    theirs = torch.tensor(running.embedding(TEXT), dtype=torch.float64)

    def distance() -> float:
        states = model(**tokenizer(TEXT, return_tensors="pt").to(model.device))[0][0].double()
        ours = normalize(states[0] if pooling == "cls" else states.mean(0), dim=0).cpu()
        return float((ours - theirs).abs().max())

    rounding = distance()
    as_written()
    return Verified(distance(), rounding, EMBEDDING_TOLERANCES[kind], running.load_seconds, running.agrees(tokenizer))


@torch.no_grad()
def verify(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str, as_written: Callable[[], None]
) -> Verified:
    """Compare a file in llama.cpp with the `model` that it was written from: tokens, and log-probabilities.

    as_written: gives the model, in place, the weights that the file has
    """
    running = Runtime(path)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    prefixes = [ids[: len(ids) * part // PLACES] for part in range(1, PLACES + 1)]
    theirs = [running.likeliest(prefix) for prefix in prefixes]

    def distance() -> tuple[float, float]:
        largest = deviation = 0.0
        for prefix, told in zip(prefixes, theirs, strict=True):
            logits = model(input_ids=torch.tensor([prefix], device=model.device))[0][0, -1]
            ours = logits.double().log_softmax(-1)
            largest = max([largest, *(abs(value - float(ours[token])) for token, value in told.items())])
            deviation += float(ours.std()) / PLACES
        return largest, deviation

    rounding, _ = distance()
    as_written()
    difference, deviation = distance()
    allowed = TOLERANCES[kind] * deviation
    return Verified(difference, rounding, allowed, running.load_seconds, running.agrees(tokenizer))
