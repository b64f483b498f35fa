"""Learning: text as batches of tokens."""
