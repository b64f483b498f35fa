"""Run a benchmark of one block or of a model, and draw its speedups."""

from pathlib import Path
from typing import Any

from pilon_compress.bench.block import bench_block
from pilon_compress.bench.model import bench_model
from pilon_compress.config.benchmark import BenchCommand
from pilon_compress.errors import BadInput
from pilon_compress.io.output_paths import check_file
from pilon_compress.report.speedup_plot import speedups
from pilon_compress.results.benchmark import Benchmark


def benchmark(config: BenchCommand, plot: str | Path | None = None) -> Benchmark:
    """Return the figures of `bench_block` or `bench_model`; draw the speedups into the SVG file `plot`.

    Raises BadInput where not exactly one of `config.model` and `config.ffn` is given, and for a file that cannot be
    written.
    """
    if (config.model is None) == (config.ffn is None):
        raise BadInput("name either a PILON folder or one block with --ffn 768x3072")
    if plot is not None:
        if Path(plot).suffix != ".svg":
            raise BadInput(f"--plot {plot} must end in .svg")
        plot = check_file(plot)
    result = bench_model(config) if config.ffn is None else bench_block(config)
    if plot is not None:
        Path(plot).write_text(speedups(parts(result.dump())))
    return result


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
