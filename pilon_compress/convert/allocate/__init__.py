"""Distributes the budget: sizes per layer, uniform or by loss."""
