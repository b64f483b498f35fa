"""Base architectures that are trained from scratch: one file each, which registers itself."""
