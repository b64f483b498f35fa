"""Experiments that the core does not import: a recipe that names one gets it."""
