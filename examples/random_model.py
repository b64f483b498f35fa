"""Make a random dense model of a real size, to see what a conversion of that size costs on your machine.

python examples/random_model.py llama-1.1b out/random           shapes: see SHAPES; a second number cuts the layers
pilon-compress convert out/random -o out/small --ffn-ratio 0.4 --samples 16 --sequence-length 128 \\
    --calibration stdlib --eval-data none --json
"""

import sys

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SHAPES = {  # family, hidden, inner, layers, heads
    "gpt2-124m": ("gpt2", 768, 3072, 12, 12),
    "llama-0.25b": ("llama", 1024, 2816, 14, 16),
    "llama-0.5b": ("llama", 1536, 4096, 16, 16),
    "llama-1.1b": ("llama", 2048, 5632, 22, 32),
}


def main(shape: str, folder: str, layers: int | None = None) -> None:
    family, hidden, inner, depth, heads = SHAPES[shape]
    names = {"hidden_size": hidden, "num_hidden_layers": layers or depth, "num_attention_heads": heads}
    names |= {"n_inner": inner} if family == "gpt2" else {"intermediate_size": inner}
    vocabulary = 50257 if family == "gpt2" else 32000
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **names)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    letters = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(models.BPE({word: index for index, word in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<eos>", eos_token="<eos>").save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
