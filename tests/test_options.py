"""Options mean what they say: each counts, or is refused in one line by the one that switches it off."""

import json

import pytest

from pilon_compress.config import conversion, training
from pilon_compress.config.ratio import parse_ratio
from pilon_compress.config.reading import Override
from pilon_compress.convert.prepare import prepare
from pilon_compress.errors import BadInput

SETTINGS = {
    "bands": "budget.bands=1",
    "n_primitives": "budget.n_primitives=6",
    "rank": "budget.rank=2",
    "top_k": "budget.top_k=2",
    "mac_ratio": "budget.mac_ratio=0.4",
    "compute": "budget.optimize=compute",
    "share": "budget.share=auto",
    "neurons": "budget.neurons=false",
    "svd": "method=svd",
    "whitened": "method=whitened-svd",
    "scalar": "form.composition=scalar",
    "int4": "form.bank_dtype=int4",
    "best": "effort=best",
    "fast": "effort=fast",
    "refine": "refine.steps=3",
    "whole": "budget.ffn_ratio=1.0",
    "unjudged": "evaluation.data=none",
    "windows": "evaluation.window=64",
    "judged": "evaluation.samples=8",
}
# setting -> those that leave one of the two without effect
REFUSED = {
    "bands": "svd whitened scalar whole",
    "n_primitives": "share neurons svd whitened",
    "rank": "share neurons",
    "top_k": "share neurons svd whitened",
    "mac_ratio": "compute",
    "share": "svd whitened scalar whole",
    "neurons": "svd whitened scalar",
    "svd": "best fast",
    "whitened": "best fast",
    "int4": "refine",
    "unjudged": "windows judged",
}
PAIRS = [(a, b) for place, a in enumerate(SETTINGS) for b in list(SETTINGS)[place + 1 :]]
SAME_FIELD = {frozenset(pair) for pair in (("svd", "whitened"), ("best", "fast"))}


def test_every_pair_of_options_counts_or_is_refused_in_one_line():
    expected = {frozenset((one, other)) for one, others in REFUSED.items() for other in others.split()}
    refused = set()
    for one, other in PAIRS:
        try:
            conversion.build({"model": "m"}, [SETTINGS[one], SETTINGS[other]])
        except BadInput as refusal:
            message = str(refusal)
            assert "\n" not in message and message.startswith("--set ")
            fields = [SETTINGS[name].partition("=")[0] for name in (one, other)]
            assert any(message.startswith(f"--set {field}: ") for field in fields), message
            refused.add(frozenset((one, other)))
    assert refused - SAME_FIELD == expected


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("model: m\nbudget:\n  rank: 4\n  share: auto\n", 4, "budget.share: has no effect with budget.rank"),
        ("model: m\nbudget:\n  rank: 2\n  neurons: true\n", 4, "budget.neurons: has no effect with budget.rank"),
        ("model: m\nbudget:\n  share: none\n  bands: 2\n", 4, "budget.bands: has no effect with budget.share none"),
        ("model: m\nrefine:\n  minutes: 2\n", 3, "refine.minutes: has no effect with refine.steps 0"),
        ("model: m\nbudget:\n  n_primitives: 3\n  top_k: 4\n", 4, "budget.top_k: is more than the 3 primitives"),
    ],
)
def test_a_recipe_file_is_refused_at_the_line_of_the_option(tmp_path, text, line, told):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(BadInput) as refusal:
        conversion.load(str(path))
    assert str(refusal.value).startswith(f"{path}:{line}: {told}")


def test_defaults_that_are_written_out_are_not_refused():
    given = {"neurons": True, "optimize": "storage", "bands": 2}
    plain = {"model": "m", "effort": "balanced", "method": "pilon", "refine": {"steps": 0}}
    assert conversion.build({**plain, "budget": given}) == conversion.build({"model": "m", "budget": {"bands": 2}})
    svd = {"model": "m", "method": "svd", "evaluation": {"data": "none"}}
    written = {**svd, "effort": "balanced", "evaluation": {"data": "none", "batch_size": 16}}
    assert conversion.build(written) == conversion.build(svd)


def test_flags_are_refused_like_recipe_fields(cli, tmp_path):
    flags = ("--method", "svd", "--effort", "best")
    assert "error: --effort: has no effect with --method svd" in cli("convert", "m", *flags, "--dry-run", code=2).stderr
    fields = ("--set", "method=svd", "--set", "effort=best")
    assert "error: --set effort: has no effect" in cli("convert", "m", *fields, "--dry-run", code=2).stderr
    fields = ("recipes", "check", "quickstart", "--set", "budget.rank=4", "--set", "budget.share=auto")
    assert "error: --set budget.share: has no effect with budget.rank" in cli(*fields, code=2).stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "--ffn-ratio 1.5",
            "--ffn-ratio: must be above 0 and at most 1, the dense size, without --allow-larger (got 1.5)",
        ),
        ("--rank many", "--rank: must be an integer (got 'many')"),
        ("--rank 4 --set budget.rank=5", "--rank and --set budget.rank disagree: leave out one of the two"),
        ("--rank 4 --set budget={top_k:2}", "--rank and --set budget disagree: leave out one of the two"),
        ("--rank 4 --set budget.share=auto", "--set budget.share: has no effect with --rank, which fixes"),
        (
            "--optimize compute --mac-ratio 0.4",
            "--optimize: has no effect with --mac-ratio, which sets the limit itself",
        ),
        (
            "--refine 3 --bank-dtype int4",
            "--refine: quantised weights cannot be refined: leave out --refine, or --bank-dtype",
        ),
    ],
)
def test_a_mistake_is_told_by_the_options_that_were_typed(cli, words, told):
    assert cli("convert", "m", "--dry-run", *words.split(), code=2).stderr.startswith(f"error: {told}")


def test_a_part_of_a_list_is_told_by_the_option(cli):
    told = cli("compare", "m", "--dry-run", "--methods", "pilon,", code=2).stderr
    assert told == "error: --methods: must not be empty (got '')\n"
    told = cli("compare", "m", "--dry-run", "--ffn-ratio", "0.5,x", code=2).stderr
    assert told.startswith("error: --ffn-ratio: must be a number") and told.endswith("(got 'x')\n")
    assert cli("convert", "", "--dry-run", code=2).stderr == "error: model: must not be empty (got '')\n"


def test_what_the_library_refuses_is_told_by_the_option(cli, dense):
    words = ("convert", dense / "bert", "--bank-dtype", "int5", "--dry-run")
    assert cli(*words, code=2).stderr.startswith("error: --bank-dtype 'int5' is none of auto, int8, int4")
    words = ("convert", dense / "bert", "--set", "form.bank_dtype=int5", "--dry-run")
    assert cli(*words, code=2).stderr.startswith("error: form.bank_dtype 'int5' is none of")


def test_options_take_the_place_of_the_recipe_and_of_equal_overrides(cli, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: m\nbudget:\n  share: auto\n")
    told = cli("convert", "--recipe", path, "--rank", "4", "--set", "budget.rank=4", "--dry-run", code=2).stderr
    assert told.startswith(f"error: {path}:3: budget.share: has no effect with --rank, which fixes")


def test_an_option_wins_over_the_recipe_and_may_repeat_a_set():
    option = Override("budget.ffn_ratio", "25%", "--ffn-ratio")
    assert conversion.load("quickstart").budget.stored_limit == 0.5
    assert conversion.load("quickstart", [option]).budget.stored_limit == 0.25
    seed = Override("seed", 7, "--seed")
    assert conversion.load("quickstart", [seed, "seed=7"]).seed == 7
    with pytest.raises(BadInput, match="--seed and --set seed disagree"):
        conversion.load("quickstart", [seed, "seed=7", "seed=8"])


# --- what only the model can tell


@pytest.fixture(scope="module")
def dense(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in ("bert", "llama"):
        tiny.save_tiny(family, folder / family)
    return folder


@pytest.mark.parametrize("name", ["window", "stride"])
def test_an_encoder_has_no_windows(cli, dense, name):
    settings = {"model": str(dense / "bert"), "evaluation": {name: 32}}
    with pytest.raises(BadInput, match=f"evaluation.{name} is for causal LMs"):
        prepare(conversion.build(settings))
    assert prepare(conversion.build({**settings, "model": str(dense / "llama")})).causal


def test_eval_refuses_windows_of_an_encoder_too(cli, dense, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"A paragraph of some words, the {n}th of them." for n in range(40)))
    words = ("eval", dense / "bert", "--against", dense / "bert", "--data", "text.txt", "--window", "16")
    assert "error: --window is for causal LMs" in cli(*words, cwd=tmp_path, code=2).stderr


def test_sharing_is_refused_where_no_block_is_replaced_as_a_whole(dense):
    settings = {"model": str(dense / "llama"), "budget": {"share": "auto"}, "scope": {"targets": ["re:.*down_proj"]}}
    with pytest.raises(BadInput, match="budget.share has no effect"):
        prepare(conversion.build(settings))


# --- ratios


@pytest.mark.parametrize(
    ("text", "ratio"),
    [
        ("50%", 0.5),
        ("0,5", 0.5),
        (".5", 0.5),
        ("1/2", 0.5),
        (" 12.5 % ", 0.125),
        ("5e-1", 0.5),
        (1, 1.0),
        ("100%", 1.0),
    ],
)
def test_a_ratio_may_be_written_in_several_ways(text, ratio):
    assert parse_ratio(text) == ratio
    built = conversion.build({"model": "m", "budget": {"ffn_ratio": text, "mac_ratio": text}}).budget
    assert built.stored_limit == built.mac_limit == ratio


@pytest.mark.parametrize("text", ["50", "1/0", "half a", "50 %%", "1e", "", True, [0.5]])
def test_what_is_no_ratio_says_what_to_give(text):
    with pytest.raises(BadInput) as refusal:
        conversion.build({"model": "m", "budget": {"ffn_ratio": text}})
    assert "50%" in str(refusal.value) and "\n" not in str(refusal.value)


def test_lists_of_ratios_share_the_parser():
    base = {"task": "heal", "start": "m"}
    assert training.build({**base, "shrink": "60%, 2/5,.2"}).shrink == [0.6, 0.4, 0.2]
    assert training.build({**base, "shrink": ["60%", 0.4]}).shrink == [0.6, 0.4]
    with pytest.raises(BadInput, match=r"shrink: must be a number, .* \(got '0.6;0.4'\)"):
        training.build({**base, "shrink": "0.6;0.4"})


def test_the_command_line_reads_percentages(cli, dense, tmp_path):
    names = (f"{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(60))
    text = (
        f"Paragraph {name} tells of nothing else but the very things that it names, and that twice." for name in names
    )
    (tmp_path / "text.txt").write_text("\n\n".join(text))
    words = ("--calibration", "text.txt", "--samples", "16", "--eval-data", "none", "--dry-run", "--json")
    ratios = ("--ffn-ratio", "60%", "--mac-ratio", "1/2")
    shown = json.loads(cli("convert", dense / "bert", *ratios, *words, cwd=tmp_path).stdout)
    assert shown["plan"]["ffn_ratio"] == 0.6 and 0.4 < shown["ffn"]["mac_ratio"] <= 0.5
    told = cli("convert", dense / "bert", "--ffn-ratio", "agressive", *words, cwd=tmp_path, code=2).stderr
    assert "error: --ffn-ratio: must be a number" in told and "did you mean 'aggressive'?" in told
