"""The benchmark of a whole model: reading a prompt, and decoding one token after it, in every form side by side."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from pilon_compress.bench.block import chosen, circumstances, set_threads
from pilon_compress.bench.block_variants import BASELINE, NotHere
from pilon_compress.bench.model_variants import FORMS
from pilon_compress.bench.timing import interleaved
from pilon_compress.config.benchmark import BenchConfig
from pilon_compress.errors import BadInput
from pilon_compress.models import checkpoint
from pilon_compress.models.limits import longest_input
from pilon_compress.models.task import vocabulary
from pilon_compress.nn.layout import BANKS


@torch.inference_mode()
def bench_model(asked: BenchConfig) -> dict[str, Any]:
    """Time `asked.model`, a PILON folder, against its dense form: `decode` (causal LMs) and `prefill`, in turns.

    `prefill` reads `context` tokens; `decode` adds one to a cache of `context` tokens. Seconds are per call, for all
    `batch` sequences. Raises BadInput for a dense model, a context that does not fit, and a name that is no form.
    """
    model, context, batch, rounds, device = str(asked.model), asked.context, asked.batch, asked.rounds, asked.device
    target = checkpoint.find_device(device)
    names = chosen(asked.variants, FORMS, BASELINE)
    pilon = checkpoint.load_model(model, dtype="float32", device=device)
    if not hasattr(pilon.base_model, BANKS):
        raise BadInput(
            f"{model} is a dense model: the benchmark takes a PILON folder and times its dense form beside it"
        )
    room = longest_input(pilon) or context + 1
    if not 1 <= context < room:
        raise BadInput(f"--context {context} is not between 1 and {room - 1}, what the model has positions for")
    set_threads(asked.threads)
    forms: dict[str, PreTrainedModel] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            forms[name] = FORMS[name](pilon)
        except NotHere as reason:
            skipped[name] = str(reason)
    ids = torch.randint(5, vocabulary(pilon.config), (batch, context), device=target)
    parts = {"prefill": {name: _prefill(form, ids) for name, form in forms.items()}}
    if checkpoint.is_causal(pilon.config):
        parts["decode"] = {name: _decode(form, ids) for name, form in forms.items()}
    result: dict[str, Any] = {"model": model, "context": context, "batch": batch, **circumstances(target, rounds)}
    for part, runs in parts.items():
        times = interleaved(runs, rounds, target, cold=False)
        result[part] = {name: times.summary(name, BASELINE) for name in runs}
    return {**result, "skipped": skipped}


def _prefill(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    last = {"logits_to_keep": 1} if checkpoint.is_causal(model.config) else {}
    return lambda: model(ids, **last)


def _decode(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    """One token more, always after the same context: the cache is cut back."""
    cache = DynamicCache(config=model.config)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before 5.23
    model(ids, use_cache=True, logits_to_keep=1, **{name: cache})
    token = ids[:, :1]

    def step() -> None:
        model(token, use_cache=True, **{name: cache})
        cache.crop(-1)

    return step
