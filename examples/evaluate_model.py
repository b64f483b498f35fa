"""Evaluate a model against the dense one: python examples/evaluate_model.py MODEL DENSE TEXT"""

import sys

import pilon_compress as pc

model, dense, text = sys.argv[1:]
figures = pc.evaluate(model, against=dense, data=text)
for name, value in figures.dump().items():
    print(f"{name}: {value}")
