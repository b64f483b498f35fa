"""Help and options of every command: sentences with defaults at 80 columns, and each option sets its own field."""

import re

import pytest
import typer

from pilon_compress.cli.main import app
from pilon_compress.cli.options import Configured
from pilon_compress.config.experts import ExpertsConfig, SlicesConfig
from pilon_compress.config.tiers import RunningTier, TrainingTier
from pilon_compress.data.readers.registry import FORMATS, SOURCES
from pilon_compress.errors import BadInput

GROUP = typer.main.get_command(app)
LEAVES = {(name,): one for name, one in GROUP.commands.items() if not hasattr(one, "commands")}
LEAVES |= {("recipes", name): one for name, one in GROUP.commands["recipes"].commands.items()}
CONFIGURED = {one.name: one.callback for one in app.registered_commands if isinstance(one.callback, Configured)}
FLAGS = [(name, flag) for name, command in CONFIGURED.items() for flag in command.flags]
VALUED = [(name, flag) for name, flag in FLAGS if not flag.is_switch and (flag.choices or not flag.is_text)]
BASE = {
    "train": ["--heal", "m"],
    "bench": [],
    "generate": ["m", "--prompt", "x"],
}  # what else a command needs; a model for the others
SAMPLES = {"--bands": "2", "--active-rank": "32", "--against": "llama.cpp"}  # where 5, 0.25 or a word is no value
NAMES = """
convert --output --recipe --set --ffn-ratio --bands --n-primitives --rank --top-k --allow-larger --method --composition
 --calibration --samples --sequence-length --batch-size --eval-data --targets --ignore --optimize --mac-ratio --effort
 --refine --dtype --bank-dtype --device --seed --max-memory --overwrite --dry-run --verbose --json
compare --output --ffn-ratio --methods --seeds --calibration --samples --sequence-length --batch-size --eval-data
 --eval-samples --device --seed --overwrite --list --dry-run --json
train --recipe --output --heal --teacher --cache-teacher --temperature --shrink --like --sft --exit-gates
 --max-perplexity-increase --ffn --primitive --share
 --ffn-ratio --mac-ratio --ternary --data
 --validation --chat-template --learn --sequence-length --tokens --batch-size --learning-rate --set --device --seed
 --resume --overwrite --dry-run --json
eval --against --data --samples --window --stride --batch-size --device --seed --json
bench --ffn --active-rank --rank --top-k --gated --activation --against --dense --batch --context --threads --rounds
 --variants --device
 --plot --json
inspect --targets --ignore --verbose --json
generate --prompt --max-new-tokens --temperature --top-k --top-p --repetition-penalty --seed --system --raw --device
 --json
export --output --to --format --rest --dtype --list --overwrite --json
"""


def words_of(parameter) -> str:
    """The sentences of an option's help, without what follows them in brackets."""
    return re.sub(r"(  \[[^\]]*\])+$", "", parameter.help)


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_help_is_in_sentences_at_80_columns_and_names_no_types(cli, path):
    shown = cli(*path, "--help").stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert not re.search(r"<\w+(\[\w+\])?>|\b(TEXT|INTEGER|FLOAT|None)\b", shown)
    assert "{" not in shown.partition("\n")[2], "registries are written out"
    for parameter in LEAVES[path].params:
        words = words_of(parameter)
        assert re.match(r"[A-Z]", words) and words.endswith("."), (parameter.name, words)
        assert re.sub(r"\s+", " ", words.split(". ")[0])[:20] in re.sub(r"\s+", " ", shown)


def test_text_sources_are_listed_from_their_registry(cli):
    for words in ("convert", "eval", "train"):
        shown = " ".join(cli(words, "--help").stdout.split())
        assert all(source.form in shown for source in SOURCES.values()) and all(suffix in shown for suffix in FORMATS)


def test_every_number_format_is_named(cli):
    shown = " ".join(cli("convert", "--help").stdout.split())
    listed = "from pilon_compress.nn.formats.registry import grids; print(*grids())"
    names = cli.python(listed).stdout.split()  # in a new process: other tests register formats of their own in this one
    assert names and all(re.search(rf"\b{n}\b", shown.split("--bank-dtype NAME")[1].split("--")[0]) for n in names)


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_option_that_takes_a_value_shows_its_default(path):
    for parameter in LEAVES[path].params:
        if parameter.param_type_name == "option" and not parameter.is_flag and not parameter.required:
            assert re.search(r"Default\b|\[default: .+\]$", parameter.help), (parameter.name, parameter.help)


def test_no_name_is_lost():
    for line in NAMES.replace("\n ", " ").strip().splitlines():
        command, *names = line.split()
        known = {name for parameter in GROUP.commands[command].params for name in parameter.opts}
        assert {*names} <= known, command


def parsed(command: str, *words: str):
    """The config that the command makes of `words`, by typer's parser."""
    base = [] if {*words} & {"--heal", "--sft", "--like", "--exit-gates"} else BASE.get(command, ["m"])
    scratch = {*words} & {"--ffn", "--primitive", "--share", "--ffn-ratio", "--mac-ratio"}
    base = ["--set", "task=pretrain"] if command == "train" and scratch else base
    base = ["--exit-gates", "m"] if "--max-perplexity-increase" in words else base
    context = GROUP.commands[command].make_context(command, [*base, *words])
    return CONFIGURED[command].read(context.params)


def at(config, path: str):
    for name in path.split("."):
        config = getattr(config, name)
    return config


def sample(flag) -> tuple[str, object]:
    """A value that is not the default: as it is typed, and as the field holds it."""
    if flag.name == "--ffn" and not flag.choices:
        return "64x128", "64x128"
    if flag.name == "--moe":
        if flag.path == "form.moe":
            return "experts=4,shared=1,top_k=2", SlicesConfig(experts=4, shared=1, top_k=2)
        return "experts=4,top_k=2", ExpertsConfig(experts=4, top_k=2)
    if flag.name == "--tier":
        return "n_hot=0.3", (TrainingTier if flag.path == "run.tier" else RunningTier)(n_hot=0.3)
    if flag.choices:
        word = next(one for one in flag.choices if one != flag.info.default)
        return word, word
    kind = next((one for one in flag.types if one in (int, float)), str)
    word = SAMPLES.get(flag.name) or {int: "5", float: "0.25", str: "x"}[kind]
    if flag.is_list:
        ratio = "RATIO" in flag.metavar
        return ("0.25", [0.25]) if ratio else (word, [word])
    return word, kind(word)


@pytest.mark.parametrize(("command", "flag"), FLAGS, ids=[f"{name} {flag.name}" for name, flag in FLAGS])
def test_every_option_sets_its_field(command, flag):
    if flag.is_argument:
        assert parsed(command, *([] if "m" in BASE.get(command, ["m"]) else ["m"])).model == "m"
        return
    if flag.is_switch:
        word, value = [flag.name], True
    else:
        typed, value = sample(flag)
        word = [flag.name, typed]
    also = ["--set", "distill.keep_best=false"] if flag.path == "run.tier" else []  # which tiers want
    config = parsed(command, *word, *also)
    assert at(config, flag.path) == value
    assert flag.info.is_required() or flag.info.default != value
    for path, other in flag.mark.also.items():
        assert at(config, path) == other


@pytest.mark.parametrize(("command", "flag"), VALUED, ids=[f"{name} {flag.name}" for name, flag in VALUED])
def test_a_value_that_is_none_is_told_by_the_option(command, flag):
    with pytest.raises(BadInput) as refused:
        parsed(command, flag.name, "no such value")
    assert str(refused.value).startswith(f"{flag.name}: must be ") and "\n" not in str(refused.value)
