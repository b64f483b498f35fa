"""Banks that a band of layers shares: which components go together, and their joint fit."""
