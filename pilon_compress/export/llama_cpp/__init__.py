"""Writes GGUF files, the format of llama.cpp: names, types and order of tensors, vocabulary; and runs them there."""
