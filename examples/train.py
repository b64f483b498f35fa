"""Train a tiny language model from scratch: python examples/train.py TEXT TOKENS"""

import sys

import pilon_compress as pc

text, tokens = sys.argv[1:]
host = pc.HostConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=192,
    vocab_size=512,
    tokenizer="bpe",
)
config = pc.TrainConfig(
    host=host, ffn=pc.FfnConfig(ffn_ratio=0.5), tokens=int(tokens), sequence_length=64, batch_size=8
)
model, result = pc.train(config=config, data=text)
print(f"{result.parameters:,} parameters, validation perplexity {result.val_perplexity:.1f}")
