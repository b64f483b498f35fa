"""Compare PILON with two baselines on one model: python examples/compare.py MODEL TEXT"""

import sys

import pilon_compress as pc

model, text = sys.argv[1:]
config = pc.CompareConfig(ffn_ratio=[0.5], methods=["pilon", "whitened-svd", "svd"], seeds=1)
found = pc.compare(model, config=config, calibration=text)
for row in found.rows:
    print(f"{row.method}: whitened loss {row.whitened_loss.mean:.4f} at {row.stored_ratio.mean:.3f} of the parameters")
