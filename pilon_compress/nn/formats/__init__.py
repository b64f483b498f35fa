"""Number formats of banks and dense matrices: one file each, which registers what it adds in `registry.FORMATS`."""
