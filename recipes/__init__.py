"""Recipes that ship with the package; a user names one by its file name without the ending."""
