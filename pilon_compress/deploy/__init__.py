"""Shipping: loading through transformers, safe saving, exports."""
