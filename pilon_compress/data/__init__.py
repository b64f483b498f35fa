"""Text: sources, token sequences, batches. Knows tokenizers, nothing of models."""
