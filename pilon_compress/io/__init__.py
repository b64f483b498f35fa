"""Read and write files safely: output folders, locks, checksums, journals, signals, progress, messages."""
