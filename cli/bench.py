"""`pilon-compress bench`: how fast a feed-forward block or a whole model is, beside its dense counterpart."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pilon_compress.errors import BadInput

from .output import print_json, print_table


def bench(
    model: Annotated[str | None, typer.Argument(help="PILON model folder; or leave it out and give --ffn.")] = None,
    ffn: Annotated[str | None, typer.Option(help="Width and hidden width of one block: 768x3072.")] = None,
    active_rank: Annotated[
        int | None, typer.Option(min=1, help="Components that are computed (k·r) [default: a quarter of the width].")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of a primitive; ternary kernels take multiples of 16.")] = 16,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Primitives that are selected, instead of --active-rank.")
    ] = None,
    gated: Annotated[bool, typer.Option(help="A block with a gate, as Llama's.")] = False,
    activation: Annotated[
        str | None, typer.Option(help="relu2, relu, silu, gelu, gelu_tanh [default: relu2, with a gate silu].")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Tokens (of a block) or sequences (of a model) at once.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens that a model reads before it decodes one.")] = 128,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads [default: torch's].")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every variant has its turn.")] = 20,
    variants: Annotated[list[str] | None, typer.Option(help="Only these, beside dense_fp32; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    plot: Annotated[Path | None, typer.Option(help="Also draw the speedups into this SVG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Time dense, int8, ternary and PILON variants in turns in one process: ratios with their spread.

    pilon-compress bench --ffn 768x3072 --active-rank 192 --batch 1 --threads 1
    """
    if (model is None) == (ffn is None):
        raise BadInput("name a PILON folder, or one block with --ffn 768x3072: one of the two")
    if plot is not None and plot.suffix != ".svg":
        raise BadInput(f"--plot {plot} does not end in .svg")
    if plot is not None:
        from pilon_compress.io.folders import check_file

        plot = check_file(plot)
    common: dict[str, Any] = {"rounds": rounds, "threads": threads, "device": device, "only": variants or []}
    if ffn is not None:
        from pilon_compress.bench.block import bench_block, block_shape

        result = bench_block(block_shape(ffn, active_rank, rank, top_k, gated, activation, batch), **common)
    else:
        from pilon_compress.bench.model import bench_model

        result = bench_model(str(model), context=context, batch=batch, **common)
    if plot is not None:
        from pilon_compress.report.plots import speedups

        plot.write_text(speedups(_parts(result)))
    if as_json:
        print_json(result)
        return
    for part, entries in _parts(result).items():
        print_entries(part, entries)
    for name, reason in result["skipped"].items():
        print(f"{name} was left out: {reason}")
    print(
        f"{result['rounds']} rounds, {result['threads']} threads, {result['hardware']}, ternary kernel: "
        f"{result['kernel']}; "
        "speedup over dense fp32: median of the rounds, 10th to 90th percentile"
    )


def _parts(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was timed, by what it is called."""
    if "ffn" in result:
        s = result["ffn"]
        gate = " gated" if s["gated"] else ""
        return {
            f"FFN {s['d']}→{s['hidden']}{gate}, k·r {s['active']}, batch {s['batch']}, caches cold": result["variants"]
        }
    about = f"{result['model']}, batch {result['batch']}"
    titles = {"prefill": f"reading {result['context']} tokens", "decode": f"decoding after {result['context']} tokens"}
    return {f"{about}: {title}": result[part] for part, title in titles.items() if part in result}


def print_entries(title: str, entries: dict[str, Any]) -> None:
    from pilon_compress.report.formatting import mib, number

    rows = []
    for name, entry in entries.items():
        low, high = entry["spread"]
        seconds = entry["seconds"]
        time = f"{number(seconds * 1e3)} ms" if seconds >= 1e-3 else f"{number(seconds * 1e6)} µs"
        share = f"{number(100 * entry['bandwidth_share'])} %" if "bandwidth_share" in entry else ""
        size = mib(entry["bytes"]) if "bytes" in entry else ""
        rows.append([name, time, f"{number(entry['speedup'])}x", f"{number(low)}–{number(high)}", size, share])
    print_table(title, ["", "time", "speedup", "spread", "weights read", "of memory bandwidth"], rows)
