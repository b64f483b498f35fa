"""Learning: text and conversations as batches of tokens."""
