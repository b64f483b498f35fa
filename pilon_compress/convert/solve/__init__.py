"""Solves for the weights of one layer after the other."""
