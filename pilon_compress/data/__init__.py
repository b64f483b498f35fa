"""Text sources, and the token sequences that are made of them."""
