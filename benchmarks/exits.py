"""Measure exit gates: work skipped and perplexity, against random skipping and dropped blocks, and the time it saves.

    pilon-compress train --exit-gates MODEL -o OUT --data TRAINING
    python benchmarks/exits.py OUT --data EVALUATION --name NAME [--tokens 16384] [--window 256]
    python benchmarks/exits.py --tables

EVALUATION is text that gates and threshold have not seen. Skipped tokens get the substitutes of OUT in every arm. Rows
go to docs/results/exits.json; those that are there are not run again, so that a slow model grows row by row.

    gates    tokens skip whose predicted price is below a threshold, which moves along the curve; "chosen": that of OUT
    random   each token skips each block with the probability that makes the same share
    blocks   all tokens skip the blocks whose mean predicted price is least
    time     reading and decoding (batch 1) with gates over without, in turns in one process, at the threshold of OUT
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import pilon_compress  # noqa: F401  registers the format with transformers
from pilon_compress.bench.timing import interleaved
from pilon_compress.data import sequences, text
from pilon_compress.models import checkpoint
from pilon_compress.nn.exits import ExitGate, gated_blocks
from pilon_compress.nn.skipping import counting
from pilon_compress.nn.specs import NEVER
from pilon_compress.train.exits.threshold import set_threshold

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "exits.json"
SHARES = (0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
BUDGETS = (0.005, 0.01, 0.02, 0.05)
MOST = 0.12  # perplexity increase at which a curve ends
DECODED = 32  # tokens of one timed call
Decision = Callable[[Tensor], Tensor]


class Measurement:
    """A gated model on evaluation rows (B, T): perplexity and skipped share under any rule of skipping."""

    def __init__(self, model: PreTrainedModel, rows: Tensor) -> None:
        self.model, self.rows = model, rows
        self.gates = [block.exit_gate for _, block in gated_blocks(model)]
        self.chosen = self.gates[0].threshold
        set_threshold(model, NEVER)
        found: list[list[Tensor]] = [[] for _ in self.gates]
        hooks = [gate.register_forward_hook(_scores_into(seen)) for gate, seen in zip(self.gates, found, strict=True)]
        self.nats = self._nats()
        for hook in hooks:
            hook.remove()
        self.scores = torch.stack([torch.cat(seen) for seen in found])

    def at(self, threshold: float) -> dict[str, float]:
        """Measure the gates with that threshold."""
        set_threshold(self.model, threshold)
        return self._measured()

    def under(self, rules: list[Decision]) -> dict[str, float]:
        """Measure with a rule for each block in the place of its gate's."""
        for gate, rule in zip(self.gates, rules, strict=True):
            gate.forward = rule
        found = self._measured()
        for gate in self.gates:
            del gate.forward
        return found

    def _measured(self) -> dict[str, float]:
        with counting(self.model) as count:
            nats = self._nats(count)
        return {"share": count.share, "increase": math.expm1(nats - self.nats)}

    @torch.no_grad()
    def _nats(self, count: Any = None) -> float:
        total = 0.0
        for ids in self.rows.split(4):
            total += float(self.model(ids, labels=ids, use_cache=False).loss) * len(ids) / len(self.rows)
            if count is not None:
                count.take(torch.ones_like(ids, dtype=torch.bool))
        return total


def _scores_into(seen: list[Tensor]) -> Any:
    def hook(gate: nn.Module, args: tuple[Tensor], skip: Tensor) -> None:
        assert isinstance(gate, ExitGate)
        seen.append((args[0].float() @ gate.weight + gate.bias).reshape(-1))

    return hook


def rows_of(model: PreTrainedModel, reference: str, source: str, tokens: int, window: int) -> Tensor:
    """Return rows of `window` tokens of the text, each behind the tokenizer's prefix."""
    tokenizer = checkpoint.load_tokenizer(reference)
    before = sequences.prefix(tokenizer)
    body = window - len(before)
    ids, _ = sequences.stream(tokenizer, list(text.open_text(source)), tokens)
    starts = range(0, len(ids) - body + 1, body)
    return torch.tensor([before + ids[start : start + body] for start in starts], device=model.device)


def times(model: PreTrainedModel, rows: Tensor, threshold: float, rounds: int) -> dict[str, Any]:
    """Time reading a row and decoding its last tokens, with gates and where no token skips."""
    found: dict[str, Any] = {}
    half = rows.shape[1] // 2

    def reading(limit: float) -> Callable[[], object]:
        def run() -> None:
            set_threshold(model, limit)
            model(rows[:1], use_cache=False)

        return run

    def decoding(limit: float) -> Callable[[], object]:
        set_threshold(model, limit)
        cache = DynamicCache(config=model.config)
        model(rows[:1, :half], past_key_values=cache, use_cache=True, logits_to_keep=1)

        def run() -> None:
            set_threshold(model, limit)
            for place in range(half, half + DECODED):
                model(rows[:1, place : place + 1], past_key_values=cache, use_cache=True)
            cache.crop(-DECODED)

        return run

    for part, made in (("read", reading), ("decode", decoding)):
        with torch.inference_mode():
            runs = {"without": made(NEVER), "gates": made(threshold)}
            told = interleaved(runs, rounds, model.device, cold=False).summary("gates", "without")
        found[part] = {"speedup": told.speedup, "spread": told.spread}
    return found


def constant(skip: bool) -> Decision:
    """Return the rule by which every token skips, or none."""
    return lambda x: torch.full(x.shape[:-1], skip, dtype=torch.bool, device=x.device)


def drawn(share: float) -> Decision:
    """Return the rule by which that share of the tokens skips, whichever they are."""
    return lambda x: torch.rand(x.shape[:-1], device=x.device) < share


def curves(one: Measurement, name: str, known: list[dict[str, Any]]) -> None:
    """Measure what is not on record yet, and record it."""
    order = one.scores.flatten().sort().values
    prices = one.scores.exp().mean(1)
    cheapest = prices.argsort().tolist()

    def missing(kind: str, place: float) -> bool:
        return not any((row["name"], row["kind"], row["place"]) == (name, kind, place) for row in known)

    def add(kind: str, place: float, measured: dict[str, float]) -> None:
        known.append({"name": name, "kind": kind, "place": place, **measured})
        RESULTS.write_text(
            json.dumps(sorted(known, key=lambda row: (row["name"], row["kind"], row["place"])), indent=1)
        )
        print(known[-1], flush=True)

    def ended(kind: str) -> bool:
        mine = (row for row in known if (row["name"], row["kind"]) == (name, kind))
        return any(row["increase"] > MOST for row in mine)

    if missing("chosen", 0):
        add("chosen", 0, one.at(one.chosen))
    for share in SHARES:
        if not ended("gates") and missing("gates", share):
            add("gates", share, one.at(float(order[int(share * len(order))])))
    for count in range(1, len(cheapest)):
        if not ended("blocks") and missing("blocks", count):
            gone = set(cheapest[:count])
            rules = [constant(index in gone) for index in range(len(prices))]
            add("blocks", count, one.under(rules))
    for share in SHARES:
        if not ended("random") and missing("random", share):
            torch.manual_seed(0)
            add("random", share, one.under([drawn(share)] * len(prices)))


def share_at(rows: list[dict[str, Any]], budget: float) -> float:
    """Return the share of work skipped at a perplexity increase, between measured points of a curve; from (0, 0)."""
    before = (0.0, 0.0)
    for share, increase in sorted((row["share"], row["increase"]) for row in rows):
        if increase > budget:
            return before[0] + (share - before[0]) * (budget - before[1]) / (increase - before[1])
        before = (share, increase)
    return before[0]


def tables(known: list[dict[str, Any]]) -> str:
    """Return the record as Markdown."""
    lines = ["| model | rule | " + " | ".join(f"+{budget:.1%}" for budget in BUDGETS) + " |", "|---|---|" + "---|" * 4]
    for name in dict.fromkeys(row["name"] for row in known):
        for kind, words in (("gates", "gates"), ("blocks", "whole blocks"), ("random", "random tokens")):
            mine = [row for row in known if (row["name"], row["kind"]) == (name, kind)]
            if mine:
                lines.append(f"| {name} | {words} | " + " | ".join(f"{share_at(mine, b):.1%}" for b in BUDGETS) + " |")
    return "\n".join(lines)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--data")
    parser.add_argument("--name", default="")
    parser.add_argument("--tokens", type=int, default=2**14)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tables", action="store_true")
    asked = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    if asked.tables:
        print(tables(known))
        return
    model = checkpoint.load_model(asked.model, dtype="float32")
    rows = rows_of(model, asked.model, asked.data, asked.tokens, asked.window)
    one = Measurement(model, rows)
    print(f"{asked.name}: perplexity {math.exp(one.nats):.2f} on {rows.numel()} tokens, threshold {one.chosen:.3g}")
    if not any((row["name"], row["kind"]) == (asked.name, "time") for row in known):
        row = {"name": asked.name, "kind": "time", "place": 0, **times(model, rows, one.chosen, asked.rounds)}
        known.append(row)
        print(row, flush=True)
    curves(one, asked.name, known)


if __name__ == "__main__":
    main()
