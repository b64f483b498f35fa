"""Distillation from the dense model: losses, teacher, cached predictions, students."""
