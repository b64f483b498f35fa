"""Judges a model: perplexity, embeddings, generation, what it consists of."""
