"""Everything that changes with the share of training that is done, as functions of that share: no state to lose."""

import math

from pilon_compress.config.training_sections import Schedule


def rate(schedule: Schedule, share: float) -> float:
    """Factor on the learning rates after `share` (0 to 1) of the steps.

    wsd: warm-up, stable, linear decay (MiniCPM, Hu et al., 2024). cosine: warm-up, half a cosine.
    """
    warm = min(1.0, share / schedule.warmup) if schedule.warmup else 1.0
    if schedule.kind == "constant":
        return warm
    if schedule.kind == "cosine":
        past = max(0.0, (share - schedule.warmup) / max(1e-9, 1 - schedule.warmup))
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, past)))
    else:
        fall = min(1.0, (1 - share) / schedule.decay) if schedule.decay else 1.0
    return warm * (schedule.floor + (1 - schedule.floor) * fall)


def fade(share: float, until: float) -> float:
    """1 at the start, 0 from `until` on, half a cosine between."""
    return 0.0 if until <= 0 or share >= until else 0.5 * (1 + math.cos(math.pi * share / until))
