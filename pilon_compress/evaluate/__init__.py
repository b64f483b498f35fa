"""Evaluate models: perplexity, embeddings, generation, composition from the config."""
