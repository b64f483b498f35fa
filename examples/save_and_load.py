"""Save a compressed model and load it back: python examples/save_and_load.py MODEL FOLDER"""

import sys

import pilon_compress as pc

dense, folder = sys.argv[1:]
config = pc.ConvertConfig(ffn_ratio=0.5, effort="fast")
model, report = pc.compress(dense, config=config, calibration="stdlib", evaluation="none")
pc.save(model, folder)
loaded = pc.load(folder)  # or AutoModel.from_pretrained(folder), after `import pilon_compress`
print(type(loaded).__name__, f"with {sum(p.numel() for p in loaded.parameters()):,} parameters, from {folder}")
