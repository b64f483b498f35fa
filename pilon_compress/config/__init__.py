"""Recipes: the fields of a conversion and of a training, how files are read and how mistakes are told."""
