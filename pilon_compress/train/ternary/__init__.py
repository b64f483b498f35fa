"""Ternary training: initial ternary weights, and the schedule that rounds more and more."""
