"""Compares PILON with baselines at equal stored numbers or equal bytes."""
