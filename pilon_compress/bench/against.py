"""Time a PILON folder against llama.cpp, which runs the dense model that the folder was made from.

Both sides get the same text and threads, in processes of their own that take turns. Ours runs as `generate` runs it.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pilon_compress.bench import llama_cpp_files
from pilon_compress.bench.block import circumstances, set_threads
from pilon_compress.bench.process import Process
from pilon_compress.bench.text import text_ids
from pilon_compress.config.benchmark import LLAMA_CPP, BenchCommand
from pilon_compress.errors import BadInput
from pilon_compress.io.progress import stages, track
from pilon_compress.models import checkpoint, files
from pilon_compress.models.in_memory import held_model
from pilon_compress.models.limits import longest_input
from pilon_compress.models.provenance import lineage
from pilon_compress.results.against import Against, OneOrEach, RuntimeFigures
from pilon_compress.results.benchmark import Benchmark

DECODED = 48  # tokens that are written in a turn
READ = (128, 512)
STARTS = 5  # new processes of each side, at most
OURS = "ours"
FIGURES = ("decode", *(f"read{count}" for count in READ), "first_token", "memory", "file")
WRITING, STARTING, TURNS = "writing GGUF files", "time to first token", "timing"

Begin = Callable[[], Process]


def bench_against(config: BenchCommand) -> Benchmark:
    """Return the times and bytes of both sides, and their ratios.

    Raises BadInput, before anything is loaded, for what cannot be timed, and for a type of file that cannot be made.
    """
    model, context = str(config.model), config.context
    dense = _checked(config)
    kinds = llama_cpp_files.known_types(config.types)
    set_threads(config.threads)
    threads = torch.get_num_threads()
    config_of, tokenizer = checkpoint.load_config(model), checkpoint.load_tokenizer(model)
    positions = longest_input(checkpoint.empty_model(config_of)) or max(READ) + context + DECODED + 1
    if context + DECODED >= positions:
        raise BadInput(f"--context must be at most {positions - DECODED - 1}, so that {DECODED} tokens can follow it")
    read = [count for count in READ if count < positions]
    ids = text_ids(model, max(context, *READ)).tolist()
    prompt = tokenizer.decode(ids[:context])
    if checkpoint.load_tokenizer(dense)(prompt)["input_ids"] != tokenizer(prompt)["input_ids"]:
        raise BadInput(f"{dense} splits text otherwise than {model} does: name the model that it was made from")
    starts = min(config.rounds, STARTS)
    weights = [(WRITING, 3.0 * len(kinds)), (STARTING, 5.0 * (starts + 1)), (TURNS, 3.0 * (config.rounds + 1))]
    with stages(weights), TemporaryDirectory(prefix="pilon-compress-") as scratch:
        made = track(llama_cpp_files.write(dense, kinds, Path(scratch)), WRITING, len(kinds))
        paths: dict[str, Path] = dict(made)
        room = min(positions, max(context + DECODED, *READ) + 1)
        sides: dict[str, Begin] = {OURS: partial(Process, "in_torch", [model, threads])}
        for kind, path in paths.items():
            sides[kind] = partial(Process, "in_llama_cpp", [path, threads, room])
        figures = _first_tokens(sides, prompt, starts)
        for name, told in _turns(sides, ids, context, read, config.rounds).items():
            figures[name] |= told
        sizes = {OURS: _bytes(model), **{kind: path.stat().st_size for kind, path in paths.items()}}
    raw = {name: RuntimeFigures(**told, file=sizes[name]) for name, told in figures.items()}
    skipped = {f"read{count}": f"the model has {positions} positions" for count in READ if count not in read}
    against = _compared(raw.pop(OURS), raw, dense=dense, starts=starts)
    about = circumstances(torch.device("cpu"), config.rounds)
    return Benchmark(model=model, context=context, batch=1, **about, against=against, skipped=skipped)


def _checked(config: BenchCommand) -> str:
    """Return the reference of the dense model. Raises BadInput for sides that cannot be run."""
    model = str(config.model)
    if config.device not in ("auto", "cpu"):
        raise BadInput(f"--device {config.device}: {LLAMA_CPP} is timed on the CPU alone")
    if held_model(model) is not None:
        raise BadInput("both sides run in processes of their own: save the model, and name its folder")
    llama_cpp_files.check_installed()
    own = checkpoint.load_config(model)
    if not checkpoint.is_pilon(own):
        raise BadInput(f"{model} is a dense model: the benchmark takes a PILON folder, and its dense model beside it")
    if not Path(checkpoint.resolve(model)).is_dir():
        raise BadInput(f"{model} is no local folder, whose bytes are counted: download it first")
    if not checkpoint.is_causal(own):
        raise BadInput(f"{model} is a {own.model_type} encoder: it writes no text, which is what is timed")
    dense = config.dense or lineage(checkpoint.resolve(model)).dense
    if dense is None:
        raise BadInput(f"{model} does not say which dense model it was made from: name it with --dense")
    llama_cpp_files.check(dense)
    return dense


def _first_tokens(sides: Mapping[str, Begin], prompt: str, starts: int) -> dict[str, dict[str, Any]]:
    """Return, by side, seconds from the start of a process to its first token, and the bytes that the process took."""
    found: dict[str, dict[str, Any]] = {name: {"first_token": [], "memory": []} for name in sides}
    for turn, names in track(_rotated(list(sides), starts + 1), STARTING, starts + 1):
        for name in names:
            with sides[name]() as process:
                process.ask(prompt=prompt, count=1)
                seconds = process.age()
                if turn:  # the first brings files into the system's cache
                    found[name]["first_token"].append(seconds)
                    found[name]["memory"].append(process.ask(peak=True)["bytes"])
    return found


def _turns(
    sides: Mapping[str, Begin], ids: list[int], context: int, read: Sequence[int], rounds: int
) -> dict[str, dict[str, Any]]:
    """Return, by side, seconds of decoding and of reading, and the text that it writes; all stay loaded."""
    found: dict[str, dict[str, Any]] = {name: {"decode": []} for name in sides}
    with ExitStack() as stack:
        running = {name: stack.enter_context(begin()) for name, begin in sides.items()}
        for turn, names in track(_rotated(list(sides), rounds + 1), TURNS, rounds + 1):
            answers = {name: running[name].ask(prompt=ids[:context], count=DECODED) for name in names}
            for name, answer in answers.items():
                if len(answer["tokens"]) != DECODED:
                    raise RuntimeError(f"{name} wrote {len(answer['tokens'])} tokens in place of {DECODED}")
                found[name]["text"] = answer["text"]
                if turn:  # the first is a warm-up
                    found[name]["decode"].append(answer["decode"])
            for count in read:
                for name in names:
                    answer = running[name].ask(prompt=ids[:count], count=1)
                    if turn:
                        found[name].setdefault(f"read{count}", []).append(answer["read"])
    return found


def _rotated(names: list[str], turns: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each turn and the order of its sides, so that none always follows the same one."""
    for turn in range(turns):
        first = turn % len(names)
        yield turn, names[first:] + names[:first]


def _bytes(model: str) -> int:
    """Return the bytes of the weights, config and tokenizer of a folder."""
    folder = Path(checkpoint.resolve(model))
    read = [*files.weight_files(folder), folder / "config.json", folder / "tokenizer.json"]
    return sum(path.stat().st_size for path in read if path.is_file())


def _compared(ours: RuntimeFigures, theirs: dict[str, RuntimeFigures], **about: Any) -> Against:
    """Return the ratios of both sides' figures, theirs ÷ ours."""
    ratios: dict[str, OneOrEach] = {}
    spread: dict[str, Any] = {}
    for figure in FIGURES:
        own = _values(ours, figure)
        if own:
            each = {
                kind: [their / mine for their, mine in zip(_values(told, figure), own, strict=True)]
                for kind, told in theirs.items()
            }
            ratios[figure] = _one_or_each({kind: statistics.median(values) for kind, values in each.items()})
            spread[figure] = _one_or_each({kind: [min(values), max(values)] for kind, values in each.items()})
    return Against(
        runtime=LLAMA_CPP,
        version=version("xllamacpp"),
        types=list(theirs),
        **ratios,  # type: ignore[arg-type]
        spread=spread,
        ours=ours,
        theirs=theirs,
        **about,
    )


def _values(told: RuntimeFigures, figure: str) -> list[float]:
    """Return the values of a figure, one for each repeat; the bytes of the files are one."""
    value = getattr(told, figure)
    return value if isinstance(value, list) else [] if value is None else [float(value)]


def _one_or_each(by_type: dict[str, Any]) -> Any:
    """Return the value of the only type, or all of them by type."""
    return next(iter(by_type.values())) if len(by_type) == 1 else by_type
