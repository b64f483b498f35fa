"""Time a complete model in every variant: reading a prompt, and decoding one token after it."""

import inspect
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from pilon_compress.bench.block import chosen, circumstances, set_threads
from pilon_compress.bench.block_variants import BASELINE, Unavailable
from pilon_compress.bench.model_variants import VARIANTS
from pilon_compress.bench.text import text_ids
from pilon_compress.bench.timing import interleaved
from pilon_compress.config.benchmark import BenchCommand
from pilon_compress.errors import BadInput
from pilon_compress.models import checkpoint
from pilon_compress.models.limits import longest_input
from pilon_compress.models.task import vocabulary
from pilon_compress.nn.installed import layout_of
from pilon_compress.nn.kernel_names import kernel_names
from pilon_compress.nn.layout import BANKS
from pilon_compress.nn.skipping import counting
from pilon_compress.results.benchmark import Benchmark

TIERED = "tiered"  # variant of a model whose banks are held in part


@torch.inference_mode()
def bench_model(config: BenchCommand) -> Benchmark:
    """Time `config.model`, a PILON folder, and its dense form in turns: `prefill`, and `decode` for causal LMs.

    `prefill` reads `context` tokens; `decode` adds one to a cache of `context` tokens. Seconds are per call, for all
    `batch` sequences. Raises BadInput for a dense model, a context that does not fit, and an unknown variant.
    """
    model, context, batch = str(config.model), config.context, config.batch
    target = checkpoint.find_device(config.device)
    names = chosen(config.variants, VARIANTS, BASELINE)
    pilon = checkpoint.load_model(model, dtype="float32", device=config.device, share=True)
    if not hasattr(pilon.base_model, BANKS):
        raise BadInput(
            f"{model} is a dense model: the benchmark takes a PILON folder and times its dense form beside it"
        )
    positions = longest_input(pilon) or context + 1
    if not 1 <= context < positions:
        raise BadInput(f"--context must be from 1 to {positions - 1}, the model's positions less one (got {context})")
    set_threads(config.threads)
    variants: dict[str, PreTrainedModel] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            variants[name] = VARIANTS[name](pilon)
        except Unavailable as reason:
            skipped[name] = str(reason)
    if config.tier is not None:
        variants[TIERED] = checkpoint.load_model(model, "float32", config.device, n_hot=config.tier.n_hot)
    share: float | None = None
    if layout_of(pilon).exits:  # whose decisions depend on the text
        ids = text_ids(model, batch * context).reshape(batch, context).to(target)
        with counting(pilon) as count:
            pilon(ids)
            count.take(torch.ones_like(ids, dtype=torch.bool))
        share = count.share
    else:
        ids = torch.randint(5, vocabulary(pilon.config), (batch, context), device=target)
    parts = {"prefill": {name: _prefill(variant, ids) for name, variant in variants.items()}}
    if checkpoint.is_causal(pilon.config):
        parts["decode"] = {name: _decode(variant, ids) for name, variant in variants.items()}
    timed: dict[str, Any] = {}
    for part, runs in parts.items():
        times = interleaved(runs, config.rounds, target, cold=False)
        timed[part] = {name: times.summary(name, BASELINE) for name in runs}
    about = circumstances(target, config.rounds)
    kernels = kernel_names(layout_of(pilon), target.type)
    timed |= {} if share is None else {"skipped_work": share}
    return Benchmark(model=model, context=context, batch=batch, **about, **timed, kernels=kernels, skipped=skipped)


def _prefill(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    last = {"logits_to_keep": 1} if checkpoint.is_causal(model.config) else {}
    return lambda: model(ids, **last)


def _decode(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    """Return a function that decodes one token after the context `ids`; it crops the cache to the context again.

    Tokens are those of the context in turn, since exit gates decide by the token.
    """
    cache = DynamicCache(config=model.config)
    # transformers before 5.23 calls the argument past_key_values
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    model(ids, use_cache=True, logits_to_keep=1, **{name: cache})
    tokens = cycle(ids.split(1, 1))

    def step() -> None:
        model(next(tokens), use_cache=True, **{name: cache})
        cache.crop(-1)

    return step
