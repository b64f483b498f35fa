"""Compute how evenly layers use a bank: entropy, Gini coefficient, and the layers that select each primitive."""

from typing import Any

import torch
from torch import Tensor


def describe(energy: Tensor, used: Tensor) -> dict[str, Any]:
    """Return statistics of one bank from `energy` (L, n), power per primitive and layer, and `used` (L, n), a mask.

    energy: shares of each layer, summing to 1. entropy: from 0 (one primitive has all energy) to 1 (all equal). gini:
    from 0 (all equal) to nearly 1. selected_share: share of the layers that select each primitive. utilisation: share
    of the primitives that any layer selects.
    """
    n = energy.shape[1]
    share = (energy / energy.sum(1, keepdim=True).clamp_min(1e-30)).double().cpu()
    entropy = torch.special.entr(share).sum(1) / max(torch.tensor(float(n)).log().item(), 1e-30)
    ranked = share.sort(dim=1).values
    position = torch.arange(1, n + 1, dtype=torch.float64)
    gini = (2 * (ranked * position).sum(1) / n - (n + 1) / n).clamp_min(0)
    uses = used.float().mean(0).cpu()
    return {
        "energy": share.tolist(),
        "entropy": entropy.clamp(0, 1).tolist(),
        "gini": gini.tolist(),
        "selected_share": uses.tolist(),
        "utilisation": float((uses > 0).double().mean()),
    }
