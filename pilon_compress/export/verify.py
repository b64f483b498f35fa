"""Verify an export: what was written computes what the model before did."""

import torch
from transformers import PreTrainedModel

from pilon_compress.models.task import vocabulary

SAMPLE = (2, 48)  # sequences and tokens on which outputs are compared
TOLERANCE = 2e-2  # of the largest output: a wrong order of neurons or a lost bias is far above, bfloat16 below


class ExportFailed(RuntimeError):
    """Raised where an export is not the model that it was written from; the export has been deleted."""


@torch.no_grad()
def outputs(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits, or of an encoder the last states, on random tokens, in float32."""
    ids = torch.randint(0, vocabulary(model.config), SAMPLE, generator=torch.Generator().manual_seed(0))
    return model.eval()(input_ids=ids.to(model.device))[0].float()


def difference(written: PreTrainedModel, before: torch.Tensor, form: str) -> float:
    """Return the largest difference of a `written` model's outputs to those `before`.

    Raises ExportFailed where it is no rounding error: the export then leaves nothing behind.
    """
    found = float((outputs(written) - before).abs().max())
    if not found <= TOLERANCE * float(before.abs().max()):
        raise ExportFailed(f"the export to {form} computes something else, by {found:.3g}: nothing is written")
    return found
