"""Tiered banks: hot primitives in memory, the others in a file, for models larger than the memory there is."""
