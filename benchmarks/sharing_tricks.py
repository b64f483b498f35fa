"""Try what others report to make sharing pay, each once: small models from scratch at equal stored numbers.

    python benchmarks/sharing_tricks.py [--only repeat] [--tokens 1048576] [--smoke]

The model of the recipe `tiny` (6 layers, 128/512, squared ReLU) with feed-forward blocks made here, a quarter of their
numbers stored; gated blocks (128/352) for the trick that is about gates. Rows go to docs/results/sharing_tricks.json.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu
from transformers import ArceeConfig, ArceeForCausalLM

from pilon_compress.data import text
from pilon_compress.models.base_architectures import train_tokenizer

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "sharing_tricks.json"
WIDTH, DEPTH, BUDGET = 128, 6, 6 * 2 * 128 * 128  # a quarter of 6 blocks of 128/512
LENGTH, BATCH, RATE = 256, 16, 3e-3


def matrix(rows: int, columns: int) -> nn.Parameter:
    """Return a matrix (rows, columns) of N(0, 0.02²)."""
    return nn.Parameter(0.02 * torch.randn(rows, columns))


class Bank(nn.Module):
    """Neurons (d, n) in and (n, d) out; `noise`: size of the noise on them in training, over their mean magnitude."""

    def __init__(self, neurons: int, noise: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.noise = matrix(WIDTH, neurons), matrix(neurons, WIDTH), noise

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return both matrices as they count in this pass."""
        return self._noisy(self.up), self._noisy(self.down)

    def _noisy(self, weight: Tensor) -> Tensor:
        if not (self.training and self.noise):
            return weight
        return weight + self.noise * weight.detach().abs().mean() * (torch.rand_like(weight) - 0.5)


class Block(nn.Module):
    """A block that uses all of a bank, with scales, biases and a low-rank term of its own where asked."""

    def __init__(self, bank: Bank, own: bool = True, rank: int = 0) -> None:
        super().__init__()
        neurons = bank.up.shape[1]
        object.__setattr__(self, "bank", bank)
        self.own, self.rank = own, rank
        if own:
            self.scale, self.bias = nn.Parameter(torch.ones(neurons)), nn.Parameter(torch.zeros(neurons))
            self.out_scale = nn.Parameter(torch.ones(neurons))
        if rank:
            self.up_a, self.up_b = matrix(WIDTH, rank), nn.Parameter(torch.zeros(rank, neurons))
            self.down_a, self.down_b = matrix(neurons, rank), nn.Parameter(torch.zeros(rank, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Compute `x` (..., d) -> (..., d)."""
        up, down = self.bank.weights()
        h = x @ up
        if self.rank:
            h = h + x @ self.up_a @ self.up_b
        h = h * self.scale + self.bias if self.own else h
        h = h.relu().square()
        wide = h * self.out_scale if self.own else h
        y = wide @ down
        return y + wide @ self.down_a @ self.down_b if self.rank else y


class GatedFactors(nn.Module):
    """A gated block of low-rank factors; `shared`: gate and up have their inner factor in common."""

    def __init__(self, neurons: int, budget: int, shared: bool) -> None:
        super().__init__()
        pairs = WIDTH * (2 if shared else 3) + neurons * 3
        rank = budget // pairs
        self.gate_in, self.down_in = matrix(WIDTH, rank), matrix(neurons, rank)
        self.up_in = self.gate_in if shared else matrix(WIDTH, rank)
        self.gate_out, self.up_out, self.down_out = matrix(rank, neurons), matrix(rank, neurons), matrix(rank, WIDTH)
        for one in (self.gate_out, self.up_out, self.down_out):
            one.data *= 0.02**-1 * rank**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """Compute `x` (..., d) -> (..., d)."""
        h = silu(x @ self.gate_in @ self.gate_out) * (x @ self.up_in @ self.up_out)
        return h @ self.down_in @ self.down_out


@dataclass(frozen=True)
class Trial:
    """A trick: the blocks of the layers, in the order in which they run, and what it costs."""

    blocks: list[nn.Module]
    banks: list[Bank]
    order: list[int]  # layers by place in the pass


def narrow(order: list[int] | None = None) -> Trial:
    """Return blocks of 128 neurons of their own; `order`: layers that run, some of them twice."""
    banks = [Bank(128) for _ in range(DEPTH)]
    return Trial([Block(bank, own=False) for bank in banks], banks, order or list(range(DEPTH)))


def banded(bands: list[list[int]], widths: list[int], own: bool = True, rank: int = 0, noise: float = 0.0) -> Trial:
    """Return blocks whose bands share banks of `widths` neurons."""
    banks = [Bank(width, noise if len(band) > 1 else 0.0) for band, width in zip(bands, widths, strict=True)]
    home = {layer: bank for band, bank in zip(bands, banks, strict=True) for layer in band}
    alone = {band[0] for band in bands if len(band) == 1}
    blocks: list[nn.Module] = [
        Block(home[layer], own and layer not in alone, 0 if layer in alone else rank) for layer in range(DEPTH)
    ]
    return Trial(blocks, banks, list(range(DEPTH)))


def gated(shared: bool) -> Trial:
    """Return gated blocks of factors at a quarter of 3 · 128 · 352 numbers."""
    return Trial([GatedFactors(352, 3 * 128 * 352 // 4, shared) for _ in range(DEPTH)], [], list(range(DEPTH)))


THREES, PAIR = [[0, 1, 2], [3, 4, 5]], [[0], [1], [2, 3], [4], [5]]
TRIALS: dict[str, Callable[[], Trial]] = {
    "fewer neurons": narrow,
    "neuron bank of three layers": lambda: banded(THREES, [384, 384]),
    "tied blocks of three layers (no scales of their own)": lambda: banded(THREES, [384, 384], own=False),
    "only the middle two layers share": lambda: banded(PAIR, [128, 128, 256, 128, 128]),
    "a low-rank term (8) of each layer beside the bank": lambda: banded(THREES, [300, 300], rank=8),
    "noise of a 3-bit step on the bank": lambda: banded(THREES, [384, 384], noise=1.0),
    "the middle layers run twice": lambda: narrow([0, 1, 2, 3, 2, 3, 4, 5]),
    "three blocks of twice the width, run twice each": lambda: Trial(
        [Block(Bank(256), own=False) for _ in range(3)], [], [0, 0, 1, 1, 2, 2]
    ),
    "gated factors": lambda: gated(False),
    "gated factors, gate and up share their inner side": lambda: gated(True),
}


def build(trial: Trial, vocabulary: int) -> ArceeForCausalLM:
    """Return the model, with the trial's blocks; layers that run twice are there twice, with the same parameters."""
    config = ArceeConfig(
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=len(trial.blocks),
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = ArceeForCausalLM(config)
    for layer, block in zip(model.model.layers, trial.blocks, strict=True):
        layer.mlp = block
    model.model.banks = nn.ModuleList(
        dict.fromkeys([*trial.banks, *(b.bank for b in trial.blocks if isinstance(b, Block))])
    )
    model.model.layers = nn.ModuleList([model.model.layers[place] for place in trial.order])
    model.config.num_hidden_layers = len(trial.order)
    return model


def windows(tokens: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield batches (BATCH, LENGTH) of windows, pass after pass in a new order."""
    generator = torch.Generator().manual_seed(seed)
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield rows[order[start : start + BATCH]]


@torch.no_grad()
def perplexity(model: ArceeForCausalLM, tokens: Tensor) -> float:
    """Return the perplexity of windows of LENGTH tokens."""
    model.eval()
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    losses = []
    for batch in rows.split(BATCH):
        logits = model(batch).logits[:, :-1]
        losses.append(cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
    return math.exp(torch.cat(losses).mean().item())


def rate(step: int, steps: int) -> float:
    """Return the factor on the learning rate: a tenth to warm up, constant, the last fifth to decay."""
    return min(1.0, (step + 1) / (0.1 * steps), (steps - step) / (0.2 * steps))


@torch.no_grad()
def rounded(model: ArceeForCausalLM, bits: int) -> None:
    """Round the bank's matrices to `bits` with one scale per 64 numbers, to nearest."""
    for bank in model.model.banks:
        for weight in (bank.up, bank.down):
            groups = weight.view(-1, 64) if weight.numel() % 64 == 0 else weight
            top = 2 ** (bits - 1) - 1
            scale = groups.abs().amax(1, keepdim=True) / top
            groups.copy_((groups / scale).round().clamp(-top - 1, top) * scale)


def train(name: str, seed: int, tokens: int, train_on: Tensor, judge_on: Tensor, vocabulary: int) -> dict[str, Any]:
    """Train one trial, and return its row."""
    torch.manual_seed(seed)
    trial = TRIALS[name]()
    model = build(trial, vocabulary)
    parts = [p for module in (*trial.blocks, *model.model.banks) for p in module.parameters()]
    stored = sum(p.numel() for p in dict.fromkeys(parts))
    steps = tokens // (LENGTH * BATCH)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    model.train()
    for step, batch in zip(range(steps), windows(train_on, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate(step, steps)
        logits = model(batch).logits[:, :-1]
        cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    row = {"trick": name, "seed": seed, "tokens": steps * LENGTH * BATCH, "stored": stored}
    row["perplexity"] = perplexity(model, judge_on)
    if len(model.model.banks):
        rounded(model, 3)
        row["perplexity, 3 bits to nearest"] = perplexity(model, judge_on)
    return row


def main() -> None:
    """Run the trials that are missing from the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="tricks whose name contains this")
    parser.add_argument("--tokens", type=int, default=1_048_576)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="two steps of each, nothing on record")
    options = parser.parse_args()
    documents = [list(text.open_text("stdlib", part=part)) for part in ("calibration", "held-out")]
    tokenizer = train_tokenizer(documents[0], 2048)
    end = tokenizer.eos_token_id
    ids = [[i for one in tokenizer(part)["input_ids"] for i in [*one, end]] for part in documents]
    train_on, judge_on = (torch.tensor(part) for part in ids)
    judge_on = judge_on[:49_152]
    if options.smoke:
        for name in TRIALS:
            print(train(name, 0, 2 * LENGTH * BATCH, train_on, judge_on[: 4 * LENGTH], len(tokenizer)))
        return
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    for seed in range(options.seeds):
        for name in (name for name in TRIALS if options.only in name):
            if not any((r["trick"], r["seed"]) == (name, seed) for r in rows):
                rows.append(train(name, seed, options.tokens, train_on, judge_on, len(tokenizer)))
                RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
                print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
