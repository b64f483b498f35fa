"""Calls for Python programs, on models as objects and by reference alike; `import pilon_compress` has all of them."""
