"""`pilon-compress bench`: how fast a feed-forward block or a whole model is, beside its dense counterpart."""

from typing import Annotated, Any

import typer

from pilon_compress.config.benchmark import BenchCommand

from .options import configured
from .output import print_json, print_table, say
from .parameters import Json

Plot = Annotated[str | None, typer.Option(metavar="FILE", help="SVG file to draw the speedups into. Default: none.")]


@configured(BenchCommand)
def bench(settings: BenchCommand, plot: Plot = None, as_json: Json = False) -> None:
    """Time dense, int8, ternary and PILON variants in turns in one process: ratios with their spread.

    pilon-compress bench --ffn 768x3072 --active-rank 192 --batch 1 --threads 1
    """
    from pilon_compress.bench.run import benchmark

    result = benchmark(settings, plot).dump()
    print_json(result) if as_json else print_result(result)


def print_result(result: dict[str, Any]) -> None:
    """Print a table for every part that was timed, and what the figures depend on."""
    from pilon_compress.bench.run import parts

    if "against" in result:
        print_against(result)
        return
    for part, entries in parts(result).items():
        print_entries(part, entries)
    for name, reason in result["skipped"].items():
        say(f"{name} was left out: {reason}")
    if (share := result.get("skipped_work")) is not None:
        say(f"{share:.1%} of the feed-forward work is skipped at exit gates, on English text")
    if kernels := result.get("kernels"):
        from pilon_compress.nn.kernel_names import kernel_note

        say(kernel_note(kernels, result["device"]))
    say(
        f"{result['rounds']} rounds, {result['threads']} threads, {result['hardware']}, ternary kernel: "
        f"{result['kernel']}; speedup over dense fp32: median of the rounds, 10th to 90th percentile"
    )


def print_against(result: dict[str, Any]) -> None:
    """Print a table for every type of the other runtime's file, what both write, and what the figures depend on."""
    from pilon_compress.bench.run import ratios

    against, context = result["against"], result["context"]
    for title, rows in ratios(result).items():
        cells = [[name, *_pair(name, row), *_ratio(row)] for name, row in rows.items()]
        print_table(title, ["", "ours", "theirs", "theirs ÷ ours", "spread"], cells)
    for name, reason in result["skipped"].items():
        say(f"{name} was left out: {reason}")
    for name, told in {"ours": against["ours"], **against["theirs"]}.items():
        say(f"{name} writes: {' '.join(told['text'].split())[:60]}")
    say(
        f"{result['rounds']} rounds in turns, {against['starts']} new processes of each side, {result['threads']} "
        f"threads, {result['hardware']}, {against['runtime']} by xllamacpp {against['version']}; decoding after "
        f"{context} tokens; "
        "first token: from the start of a process, imports and loading included; memory: of that process; medians, "
        "lowest to highest; above 1 ours takes less"
    )


def _ratio(row: dict[str, Any]) -> list[str]:
    """Return the cells of a ratio and its spread."""
    from pilon_compress.report.formatting import number

    low, high = row["spread"]
    return [number(row["speedup"]), number(low) if low == high else f"{number(low)}–{number(high)}"]


def _pair(name: str, row: dict[str, Any]) -> list[str]:
    """Return the cells of a figure on both sides: tokens a second, seconds, or MiB."""
    from statistics import median

    from pilon_compress.report.formatting import mib, number

    found = []
    for side in ("ours", "theirs"):
        value = median(row[side]) if isinstance(row[side], list) else row[side]
        if name in ("memory", "file"):
            found.append(mib(value))
        elif name == "first token":
            found.append(f"{number(value)} s")
        else:
            count = int(name.split()[1]) if name.startswith("reading") else 1
            found.append(f"{number(count / value)}/s")
    return found


def print_entries(title: str, entries: dict[str, Any]) -> None:
    """Print the variants of one part: time, speedup with its spread, and the memory that is read."""
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
