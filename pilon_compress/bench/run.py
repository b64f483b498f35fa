"""Run a benchmark of one block or of a model, and draw its speedups."""

from pathlib import Path
from typing import Any

from pilon_compress.bench.against import FIGURES, bench_against
from pilon_compress.bench.block import bench_block
from pilon_compress.bench.model import bench_model
from pilon_compress.config.benchmark import BenchCommand
from pilon_compress.errors import BadInput
from pilon_compress.io.output_paths import check_file
from pilon_compress.report.speedup_plot import speedups
from pilon_compress.results.benchmark import Benchmark


def benchmark(config: BenchCommand, plot: str | Path | None = None) -> Benchmark:
    """Return the figures of `bench_block`, `bench_model` or `bench_against`; draw ratios into the SVG file `plot`.

    Raises BadInput where not exactly one of `config.model` and `config.ffn` is given, and for a file that cannot be
    written.
    """
    if (config.model is None) == (config.ffn is None):
        raise BadInput("name either a PILON folder or one block with --ffn 768x3072")
    if config.dense is not None and config.against is None:
        raise BadInput("--dense names the model of another runtime: name that with --against")
    run = bench_block if config.model is None else bench_model if config.against is None else bench_against
    if plot is not None:
        if Path(plot).suffix != ".svg":
            raise BadInput(f"--plot {plot} must end in .svg")
        plot = check_file(plot)
    result = run(config)
    if plot is not None:
        Path(plot).write_text(_drawn(result.dump()))
    return result


def _drawn(result: dict[str, Any]) -> str:
    """Return the plot of a result, as SVG."""
    if "against" not in result:
        return speedups(parts(result))
    runtime = result["against"]["runtime"]
    title = f"{runtime} ÷ PILON, in time and bytes, the dense model in llama.cpp"
    return speedups(ratios(result), f"{runtime} ÷ PILON: above 1 PILON takes less", title)


NAMES = {"decode": "decoding", "first_token": "first token", "memory": "memory", "file": "file"}


def ratios(result: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return, by the title of its table, the ratios to each type of file of the other runtime: by figure."""
    against, found = result["against"], {}
    several = len(against["types"]) > 1
    for kind in against["types"]:
        rows = {}
        for figure in (one for one in FIGURES if one in against):
            ratio, spread = against[figure], against["spread"][figure]
            values = (
                {"speedup": ratio[kind], "spread": spread[kind]} if several else {"speedup": ratio, "spread": spread}
            )
            values |= {"ours": against["ours"][figure], "theirs": against["theirs"][kind][figure]}
            rows[NAMES.get(figure) or f"reading {figure.removeprefix('read')}"] = values
        found[f"{result['model']} against {against['dense']} in {against['runtime']}, {kind}"] = rows
    return found


def parts(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the timed variants by the title of their table."""
    if "ffn" in result:
        s = result["ffn"]
        gate = " gated" if s["gated"] else ""
        return {
            f"FFN {s['d']}→{s['hidden']}{gate}, k·r {s['active']}, batch {s['batch']}, caches cold": result["variants"]
        }
    about = f"{result['model']}, batch {result['batch']}"
    titles = {"prefill": f"reading {result['context']} tokens", "decode": f"decoding after {result['context']} tokens"}
    return {f"{about}: {title}": result[part] for part, title in titles.items() if part in result}
