"""Export a PILON model to a plain dense one: python examples/export.py PILON_FOLDER FOLDER"""

import sys

import pilon_compress as pc

model, folder = sys.argv[1:]
result = pc.export(model, folder, to="dense")
print(f"{result.output} loads with {result.load}")
