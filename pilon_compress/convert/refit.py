"""Refit the `down` projections of a cut model on text, each behind the cut layers before it.

The model before the cut is the reference: no dense model is needed. Targets are those of `solve.sequential_targets`, so
`down` also makes up for what the residual stream has lost, as in a conversion to that size; `up` and `gate` stay.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pilon_compress.config.effort import EFFORTS
from pilon_compress.convert.prepare import CAUSAL_LENGTH, ENCODER_LENGTH
from pilon_compress.convert.solve.low_rank import Target
from pilon_compress.convert.solve.sequential_targets import BlockPair
from pilon_compress.convert.texts import Calibration, read_calibration
from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.io.progress import track
from pilon_compress.models import checkpoint
from pilon_compress.models.families import find_sites
from pilon_compress.models.hidden_states import Stream
from pilon_compress.models.limits import longest_input
from pilon_compress.models.source import Source
from pilon_compress.models.task import vocabulary
from pilon_compress.nn.dense_linear import DenseLinear

BATCH = 16


@torch.no_grad()
def refit_on_text(model: PreTrainedModel, source: str, text: str, seed: int = 0) -> None:
    """Refit, in place, a `model` that was cut from the file `source`, on the text source `text`.

    Raises BadInput for text that cannot be read, and for a model with nothing to refit.
    """
    dtype = model.dtype
    whole, tokenizer = checkpoint.load_model(source, dtype="float32"), checkpoint.load_tokenizer(source)
    skeleton = checkpoint.empty_model(whole.config)
    downs = [site for site in find_sites(skeleton) if site.role == "down"]
    causal = checkpoint.is_causal(whole.config)
    length = min(longest_input(skeleton) or CAUSAL_LENGTH, CAUSAL_LENGTH if causal else ENCODER_LENGTH)
    samples = EFFORTS["balanced"].samples(causal, max(site.d_in for site in downs), length)
    asked = Calibration(text, samples, length, BATCH)
    batches = read_calibration(asked, tokenizer, causal=causal, vocabulary=vocabulary(whole.config), seed=seed)
    names = [site.name for site in downs if isinstance(model.base_model.get_submodule(site.name), DenseLinear)]
    if not names:
        raise BadInput("no `down` of this model is one matrix, so text cannot refit the cut: leave out --calibration")
    refit(whole, model.float(), batches, names)
    model.to(dtype)


def refit(whole: PreTrainedModel, cut: PreTrainedModel, batches: Sequence[Batch], names: Sequence[str]) -> None:
    """Refit, in place, the dense projections `names` of `cut` on `batches`, first layer to last."""
    source = Source(whole)
    theirs = Stream(source, batches)
    ours = theirs.fork()
    for block in track(source.names, "refitting layers"):
        pair = BlockPair(whole.base_model.get_submodule(block), cut.base_model.get_submodule(block), theirs, ours)
        local = next((name.removeprefix(f"{block}.") for name in names if name.startswith(f"{block}.")), None)
        pair.inputs((), local)
        if local is not None:
            _refit(pair, local, pair.converted.get_submodule(local))
        pair.finish()


def _refit(pair: BlockPair, name: str, down: Any) -> None:
    """Put the least-squares weight of `down` in the place of its own, which is the prior; its bias follows."""
    cross = pair.output(name)
    weight = down.weight.T.double()
    identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    fitted = cross.target(Target(name, 0, weight, identity), centred=down.bias is not None).weight
    down.weight = nn.Parameter(fitted.T.to(down.weight).contiguous(), requires_grad=False)
    if down.bias is not None:
        down.bias = nn.Parameter(cross.bias(fitted).to(down.bias), requires_grad=False)
