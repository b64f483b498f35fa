"""Opening models, and the architectures that can be converted."""
