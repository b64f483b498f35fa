"""Kernels that compute the ternary projections; they know nothing of models."""
