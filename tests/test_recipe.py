"""A recipe means what it says, and a mistake in one is reported where it was made."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilon_compress.config import conversion, recipes, training
from pilon_compress.config.ratio import PRESETS
from pilon_compress.errors import BadInput


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def complaint(call, *arguments) -> str:
    with pytest.raises(BadInput) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what ships


def test_every_bundled_recipe_is_valid_and_shows_its_own_command():
    known = recipes.names()
    assert {name for name, _ in known} >= {"quickstart", "gpt2-half", "llama-half", "bert-half", "smoke", "tiny"}
    for name, description in known:
        assert description.endswith(".") and len(description) > 20
        lines, kind = recipes.source(name).splitlines(), recipes.kind(name)
        schema = "train" if kind == "train" else "recipe"
        assert lines[1] == f"# yaml-language-server: $schema=./{schema}.schema.json"
        assert any(f"pilon-compress {kind} --recipe {name} -o out/" in line for line in lines)
        if kind == "train":
            assert training.load(name).task == "pretrain"
        else:
            asked = conversion.load(name)
            assert asked.budget.stored_limit == (
                1.0 if asked.form.bank_dtype != "auto" else 0.4 if name == "banks" else 0.5
            )
            assert asked.budget.share == ("always" if name == "banks" else "none")


def test_a_recipe_of_the_other_kind_is_told_in_one_line_that_names_its_command(write):
    assert complaint(conversion.load, "tiny") == "tiny.yaml trains a model: pilon-compress train --recipe tiny"
    told = complaint(training.load, "quickstart")
    assert told == "quickstart.yaml converts a model: pilon-compress convert --recipe quickstart"
    path = write("task: pretrain\nbudget: {ffn_ratio: 0.5}\n")
    assert f"pilon-compress train --recipe {path}" in complaint(conversion.load, path, ["seed=1"])
    assert (recipes.kind("tiny"), recipes.kind("quickstart"), recipes.kind(path)) == (
        "train",
        "convert",
        "train",
    )


def test_the_originals_training_differs_from_tiny_in_its_own_ways_alone():
    tiny, original = (training.load(name).model_dump() for name in ("tiny", "original"))
    assert {section for section in tiny if tiny[section] != original[section]} == {"ffn", "research"}
    staged = original["research"]["original"]["staged"]
    assert staged["banks"][1:] == [0, 0] and staged["phases"][0] == 0.2
    for size in ("ffn_ratio", "mac_ratio"):
        assert original["ffn"][size] == tiny["ffn"][size]


def test_quickstart_needs_no_network():
    settings = conversion.load("quickstart")
    assert settings.model.startswith("package:")
    assert settings.calibration.data == "stdlib"
    assert settings.evaluation.data is None  # the held-out part of the calibration source


@pytest.mark.parametrize(("name", "kind"), [("recipe", conversion), ("train", training)])
def test_schema_file_is_in_step_with_the_code(name, kind):
    stored = files("pilon_compress.recipes").joinpath(f"{name}.schema.json").read_text("utf-8")
    assert json.loads(stored) == kind.schema(), "run `make fix`"


@pytest.mark.parametrize("kind", [conversion, training])
def test_schema_closes_every_section(kind):
    schema = kind.schema()
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False


def test_schema_describes_every_field():
    schema = conversion.schema()
    for section in (schema, *schema["$defs"].values()):
        for name, field in section["properties"].items():
            assert field.get("description") or "$ref" in field, name


# --- reading


def test_defaults(write):
    settings = conversion.load(write("model: gpt2\n"))
    assert (settings.method, settings.seed, settings.dtype, settings.device) == ("pilon", 0, "auto", "auto")
    assert settings.budget.stored_limit == 0.5
    assert settings.form.composition == "component"
    assert settings == conversion.build({"model": "gpt2"})


@pytest.mark.parametrize(
    ("preset", "ratio"),
    [("minimal", 0.9), ("baseline", 0.75), ("mild", 0.6), ("moderate", 0.5), ("aggressive", 0.25), ("extreme", 0.1)],
)
def test_presets_are_stored_ratios(preset, ratio):
    named = conversion.build({"model": "gpt2", "budget": {"ffn_ratio": preset}})
    assert named.budget.stored_limit == ratio and named == conversion.build(
        {"model": "gpt2", "budget": {"ffn_ratio": ratio}}
    )


def test_scalars_follow_yaml_1_2(write):
    settings = conversion.load(write("model: no\nbudget: {ffn_ratio: 1e-3}\ncalibration: {data: 1:20}\n"))
    assert (settings.model, settings.budget.ffn_ratio, settings.calibration.data) == ("no", 0.001, "1:20")


def test_a_bundled_name_wins_over_a_file_and_a_path_reaches_the_file(tmp_path, monkeypatch):
    (tmp_path / "quickstart").write_text("model: my-own\n")
    monkeypatch.chdir(tmp_path)
    assert conversion.load("quickstart").model.startswith("package:")
    assert conversion.load("./quickstart").model == "my-own"


def test_bands_by_number_or_by_layers(write):
    assert conversion.load(write("model: m\nbudget: {bands: 4}\n")).budget.bands == 4
    assert conversion.load(write("model: m\nbudget: {bands: [[0, 1], [2]]}\n")).budget.bands == [[0, 1], [2]]


# --- mistakes in a file: the line, the field, the remedy


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        ("model: m\nbudget:\n  rank: 4\n  ffn_ratoi: 0.5\n", 4, ["budget.ffn_ratoi", "unknown", "'ffn_ratio'"]),
        ("metod: svd\nmodel: m\n", 1, ["metod", "'method'"]),
        ("model: m\nbudget:\n  ffn_ratio: 1.5\n", 3, ["budget.ffn_ratio", "at most 1", "1.5"]),
        ("model: m\nbudget:\n  ffn_ratio: 0\n", 3, ["budget.ffn_ratio", "above 0"]),
        ("model: m\nbudget:\n  ffn_ratio: .nan\n", 3, ["budget.ffn_ratio", "finite"]),
        ("model: m\nbudget:\n  ffn_ratio: 5\n  allow_larger: true\n", 3, ["budget.ffn_ratio", "at most 4"]),
        ("model: m\nbudget:\n  preset: mild\n", 3, ["budget.preset moved to budget.ffn_ratio"]),
        ("model: m\nbudget:\n  ffn_ratio: tiny\n", 3, ["budget.ffn_ratio", "minimal"]),
        ("model: m\nbudget:\n  ffn_ratio: midl\n", 3, ["budget.ffn_ratio", "did you mean 'mild'?"]),
        ("model: m\nbudget:\n  rank: true\n", 3, ["budget.rank", "integer"]),
        ("model: m\nbudget:\n  bands: [[0, 1], []]\n", 3, ["budget.bands", "layers of each band"]),
        ("model: m\nbudget:\n  bands: 0\n", 3, ["budget.bands", "number of bands"]),
        ("model: m\n\nbudget: 0.5\n", 3, ["budget", "section", "ffn_ratio"]),
        ("model: m\nscope:\n  targets:\n  - up\n  - 're:('\n", 5, ["scope.targets.1", "regular expression"]),
        ("model: m\nevaluation:\n  window: 8\n  stride: 9\n", 4, ["evaluation.stride", "skipped"]),
        ("model: m\nseed: -1\n", 2, ["seed"]),
        ("model: m\nseed: 0\nmodel: n\n", 3, ["model", "twice"]),
        ("model: m\nbudget: [\n", 3, ["not valid YAML"]),
        ("model: m\nseed: !!python/name:os.system x\n", 2, ["not a value"]),
        ("- model: m\n", 1, ["set of fields"]),
    ],
)
def test_a_mistake_is_reported_with_file_and_line(write, text, line, parts):
    path = write(text)
    message = complaint(conversion.load, path)
    assert message.startswith(f"{path}:{line}: ")
    assert all(part in message for part in parts), message


def test_the_first_of_several_mistakes_is_shown_and_the_others_counted(write):
    path = write("model: m\nunknown: 1\nbudget:\n  rank: 0\nseed: x\n")
    message = complaint(conversion.load, path)
    assert message.startswith(f"{path}:2: unknown: ") and message.endswith("(+2 more)")


def test_a_recipe_without_a_model(write):
    assert "model: required" in complaint(conversion.load, write("seed: 1\n"))
    assert "model: required" in complaint(conversion.load, write(""))
    assert complaint(conversion.build, {}).startswith("command line: model: required")


@pytest.mark.parametrize("text", ["model: &a [*a]\n", "model: " + "[" * 5000], ids=["cycle", "deep"])
def test_hostile_yaml_is_one_line_too(write, text):
    assert "nested " in complaint(conversion.load, write(text))


def test_unreadable_recipes(tmp_path):
    assert "'quickstart'" in complaint(conversion.load, "quickstrat")
    assert "gpt2-half" in complaint(conversion.load, "nothing-like-it")
    assert "irectory" in complaint(conversion.load, str(tmp_path))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"model: \xff\xfe\n")
    assert "UTF-8" in complaint(conversion.load, str(binary))


# --- overrides


def test_overrides_are_yaml_values_and_the_last_one_counts(write):
    path = write("model: m\nscope: {targets: [up]}\n")
    settings = conversion.load(
        path, ["seed=3", "seed=4", "budget.ffn_ratio=1e-1", "scope.targets=[down, 're:.*mlp']", "calibration.data=a=b"]
    )
    assert (settings.seed, settings.budget.stored_limit) == (4, 0.1)
    assert settings.scope.targets == ["down", "re:.*mlp"]
    assert settings.calibration.data == "a=b"
    assert conversion.load(path).scope.targets == ["up"]  # reading again is not affected


@pytest.mark.parametrize(
    ("override", "start", "part"),
    [
        ("budget.rank=1.5", "--set budget.rank: ", "integer"),
        ("budget.ffn_ratio=nan", "--set budget.ffn_ratio: ", "number"),
        ("budget={rank: x}", "--set budget: budget.rank: ", "integer"),
        ("budgte.rank=3", "--set budgte.rank: budgte: ", "'budget'"),
        ("model.name=x", "--set model.name: ", "no fields"),
        ("budget", "--set budget: ", "FIELD=VALUE"),
        ("=3", "--set =3: ", "FIELD=VALUE"),
        ("seed=[", "--set seed", "not valid YAML"),
    ],
)
def test_a_mistake_in_an_override_is_blamed_on_it_and_not_on_the_file(write, override, start, part):
    message = complaint(conversion.load, write("model: m\n"), [override])
    assert message.startswith(start) and part in message


# --- writing

positive = st.none() | st.integers(1, 10**6)
words = st.text(min_size=1) | st.sampled_from(["1e-3", "no", "null", "~", "012", "1:20", "2026-01-01", "a: b", "- x"])
budgets = st.fixed_dictionaries(
    {},
    optional={
        "bands": positive | st.lists(st.lists(st.integers(0, 99), min_size=1), min_size=1),
        "rank": positive,
        "n_primitives": positive,
    },
).flatmap(
    lambda rest: st.one_of(
        st.just(rest),
        st.floats(0, 1, exclude_min=True).map(lambda ratio: {**rest, "ffn_ratio": ratio}),
        st.floats(1, 4).map(lambda ratio: {**rest, "ffn_ratio": ratio, "allow_larger": True}),
        st.sampled_from(sorted(PRESETS)).map(lambda preset: {**rest, "ffn_ratio": preset}),
    )
)
conversions = st.fixed_dictionaries(
    {"model": words, "budget": budgets},
    optional={
        "method": st.sampled_from(["pilon", "svd"]),
        "seed": st.integers(0, 2**32 - 1),
        "scope": st.fixed_dictionaries({"ignore": st.lists(words.filter(lambda word: not word.startswith("re:")))}),
        "calibration": st.fixed_dictionaries({}, optional={"data": words, "samples": positive}),
        "evaluation": st.fixed_dictionaries({}, optional={"data": words, "window": positive}),
    },
)


@settings(derandomize=True, database=None, deadline=None)
@given(conversions)
def test_dump_reads_back_as_the_same_recipe(tmp_path_factory, data):
    if data.get("method") == "svd":  # which takes no other shape than a rank
        data["budget"] = {key: value for key, value in data["budget"].items() if key not in ("bands", "n_primitives")}
    written = conversion.build(data)
    path = Path(tmp_path_factory.getbasetemp()) / "dumped.yaml"
    path.write_text(conversion.dump(written), encoding="utf-8", newline="")
    assert conversion.load(str(path)) == written


def test_dump_is_short_and_always_says_what_matters_most():
    lines = conversion.dump(conversion.build({"model": "gpt2", "budget": {"bands": [[0, 1], [2]]}})).splitlines()
    assert lines[:5] == ["model: gpt2", "method: pilon", "seed: 0", "budget:", "  ffn_ratio: 0.5"]
    assert "  bands: [[0, 1], [2]]" in lines and "calibration:" in lines
    assert not any(line.startswith(("device", "scope", "evaluation")) for line in lines)


def test_a_healing_at_the_rate_of_other_tasks_is_written_down(tmp_path):
    written = training.build({"task": "heal", "start": "m", "optimizer": {"learning_rate": 1e-3}})
    (tmp_path / "recipe.yaml").write_text(training.dump(written))
    assert training.load(str(tmp_path / "recipe.yaml")).optimizer.learning_rate == 1e-3
