"""Train a small GPT-2 or Llama on text that ships with Python, as a dense model to compress.

python examples/train_small_lm.py gpt2 out/small-gpt2
python examples/train_small_lm.py llama out/small-llama

3 M parameters, 3.5 M tokens (several passes over the calibration part of `stdlib`), about ten minutes on two cores.
"""

import sys
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pilon_compress.data.text import open_text
from pilon_compress.models.base_architectures import train_tokenizer

shape, output = sys.argv[1:]
VOCAB, LENGTH, BATCH, TOKENS, RATE = 2048, 256, 16, 3_500_000, 2e-3

documents = list(open_text("stdlib", part="calibration"))
tokenizer = train_tokenizer(documents, VOCAB)
ids = torch.tensor([i for text in documents for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])

torch.manual_seed(0)
common = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True}
if shape == "gpt2":
    config = GPT2Config(n_embd=192, n_layer=6, n_head=6, n_positions=LENGTH, **common)
    model = GPT2LMHeadModel(config)
else:
    config = LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        **common,
    )
    model = LlamaForCausalLM(config)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(ids):,} tokens of text", flush=True)

steps = TOKENS // (LENGTH * BATCH)
decayed = [p for p in model.parameters() if p.dim() > 1]
plain = [p for p in model.parameters() if p.dim() == 1]
groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
started = time.time()
for step in range(steps):
    starts = torch.randint(0, len(ids) - LENGTH, (BATCH,)).tolist()
    batch = torch.stack([ids[s : s + LENGTH] for s in starts])
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    if step % 50 == 0 or step == steps - 1:
        print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.time() - started:.0f} s", flush=True)

model.save_pretrained(output)
tokenizer.save_pretrained(output)
