"""What the projections see: means and second moments of their inputs, streamed over calibration text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pilon_compress.errors import BadInput
from pilon_compress.families import Site
from pilon_compress.progress import track


class SecondMoment:
    """Running mean (d,) and centred scatter Σ (x-μ)(x-μ)ᵀ (d, d) of the rows it is given.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979): every batch is centred on its own mean
    first, so float32 is accurate even where the mean is large against the spread.
    """

    def __init__(self, dim: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=dtype, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=dtype, device=device)

    def update(self, x: Tensor) -> None:
        """Add rows `x` (N, d)."""
        if not len(x):
            return
        x = x.to(self.mean.dtype)
        batch_mean = x.mean(0)
        centred = x - batch_mean
        shift = batch_mean - self.mean
        total = self.count + len(x)
        self.scatter.addmm_(centred.T, centred)
        self.scatter.addr_(shift, shift, alpha=self.count * len(x) / total)
        self.mean += shift * (len(x) / total)
        self.count = total

    def covariance(self) -> Tensor:
        """Centred second moment E[(x-μ)(x-μ)ᵀ], (d, d) float64."""
        return self.scatter.double() / self.count

    def second_moment(self) -> Tensor:
        """Uncentred second moment E[xxᵀ], (d, d) float64."""
        mean = self.mean.double()
        return self.covariance() + torch.outer(mean, mean)


@dataclass(frozen=True)
class Batch:
    """Token ids and attention mask, both (B, T); masked positions are padding."""

    input_ids: Tensor
    attention_mask: Tensor


def encoder_batches(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, batch_size: int
) -> list[Batch]:
    """Texts as padded batches, longest first, so that little is padding and memory peaks at the start."""
    texts = sorted(texts, key=len, reverse=True)
    batches = []
    for start in range(0, len(texts), batch_size):
        encoded = tokenizer(
            texts[start : start + batch_size],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        batches.append(Batch(encoded["input_ids"], encoded["attention_mask"]))
    return batches


def causal_batches(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], length: int, samples: int, batch_size: int
) -> list[Batch]:
    """Documents joined by EOS and cut into at most `samples` blocks of `length` tokens, in batches."""
    blocks: list[list[int]] = []
    buffer: list[int] = []
    for document in documents:
        buffer += tokenizer(document, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            buffer.append(tokenizer.eos_token_id)
        while len(buffer) >= length and len(blocks) < samples:
            blocks.append(buffer[:length])
            buffer = buffer[length:]
        if len(blocks) == samples:
            break
    stacks = [torch.tensor(blocks[i : i + batch_size]) for i in range(0, len(blocks), batch_size)]
    return [Batch(ids, torch.ones_like(ids)) for ids in stacks]


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, batches: Sequence[Batch], sites: Sequence[Site], dtype: torch.dtype = torch.float32
) -> dict[str, SecondMoment]:
    """Run the base model over `batches` and return the moments of every distinct projection input, by `Site.input`.

    Padding does not count. Raises BadInput if an activation is not finite.
    """
    device = model.device
    inputs = {site.input: site for site in sites}
    moments = {name: SecondMoment(site.d_in, dtype, device) for name, site in inputs.items()}
    kept = torch.empty(0, dtype=torch.bool, device=device)

    def watch(name: str) -> object:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            moments[name].update(x.reshape(-1, x.shape[-1])[kept])

        return model.base_model.get_submodule(name).register_forward_pre_hook(hook)

    handles = [watch(name) for name in inputs]
    try:
        for batch in track(batches, "calibrating"):
            kept = batch.attention_mask.bool().reshape(-1).to(device)
            model.base_model(
                input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device), **_no_cache(model)
            )
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
    for name, moment in moments.items():
        if not bool(torch.isfinite(moment.scatter).all() & torch.isfinite(moment.mean).all()):
            raise BadInput(f"the input of {name} is NaN or infinite on the calibration text: no moments can be taken")
    return moments


def _no_cache(model: PreTrainedModel) -> dict[str, bool]:
    return {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}


def tokens(batches: Sequence[Batch]) -> int:
    """How many tokens are not padding."""
    return int(sum(int(batch.attention_mask.sum()) for batch in batches))


def sequences(batches: Sequence[Batch]) -> int:
    return sum(len(batch.input_ids) for batch in batches)
