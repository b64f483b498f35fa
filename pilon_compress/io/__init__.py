"""Files and folders: outputs and their locks, checksums, companions of a model, signals. Imports no torch."""
