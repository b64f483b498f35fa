"""Dense models: references that users name, files, configs, blocks, and hidden states between the blocks."""
