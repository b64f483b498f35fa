"""Let a converted model learn from its dense teacher: python examples/heal.py PILON_FOLDER TEXT TOKENS"""

import sys

import pilon_compress as pc

folder, text, tokens = sys.argv[1:]
config = pc.HealConfig(tokens=int(tokens), sequence_length=64, batch_size=8)
model, result = pc.heal(folder, config=config, data=text)
measured = result.val_perplexity or result.val_cosine
print(f"{result.before:.4g} before healing, {measured:.4g} after {result.tokens:,} tokens")
