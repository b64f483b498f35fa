"""Judging: sizes, perplexity, fidelity, and the report of a conversion."""
