"""`python -m pilon_compress.cli`: the same as `pilon-compress`."""

from .main import main

main()
