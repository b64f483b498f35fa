"""Files: output folders, locks, checksums, journals, signals, progress. Torch is imported only to spill tensors."""
