"""Research in recipes: bound when a recipe names it, checked like any other section, and out of the core otherwise."""

import subprocess
import sys

import pytest

from pilon_compress.config import training
from pilon_compress.config.training import TrainRecipe
from pilon_compress.errors import BadInput
from pilon_compress.train.run import changed


@pytest.fixture
def complaint(tmp_path):
    def complaint(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        with pytest.raises(BadInput) as caught:
            training.load(str(path))
        message = str(caught.value).removeprefix(str(path))
        assert "\n" not in message
        return message

    return complaint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("research:\n  orignal: {}\n", ":3: research.orignal: unknown field; did you mean 'original'?"),
        (
            "research:\n  original:\n    stagd: {}\n",
            ":4: research.original.stagd: unknown field; did you mean 'staged'?",
        ),
        (
            "research:\n  original:\n    selection:\n      explore: nose\n",
            ":5: research.original.selection.explore: must be 'none', 'anneal', 'noise' or 'gumbel' (got 'nose')",
        ),
        (
            "research:\n  original:\n    staged:\n      phases: [0.5, 0.7]\n",
            ":4: research.original.staged: phases must grow, and end at 1 (got {'phases': [0.5, 0.7]})",
        ),
        ("research:\n  original: 3\n", ":3: research.original: must be a section, with some of the fields latent_"),
        ("research: 3\n", ":2: research: must be a section, with some of the fields bitnet, original"),
    ],
)
def test_a_mistake_is_told_with_its_line(complaint, text, message):
    assert complaint("task: pretrain\n" + text).startswith(message)


@pytest.mark.parametrize("field", sorted(TrainRecipe.MOVED))
def test_a_field_that_has_moved_says_where_to(complaint, field):
    section, _, leaf = field.partition(".")
    text = f"task: pretrain\n{section}: {{{leaf}: 0}}\n" if leaf else f"task: pretrain\n{section}: {{}}\n"
    target = TrainRecipe.MOVED[field]
    assert complaint(text) == f":2: {field}: unknown field; {field} moved to {target}"
    words = target.split(".")
    model = TrainRecipe
    for word in words[:-1]:
        model = model.parts()[word]
    assert words[-1] in model.parts()


def test_a_section_that_does_not_go_with_the_task_is_refused_at_its_line(complaint):
    text = "task: heal\nstart: x\nresearch:\n  original:\n    selection: {explore: noise}\n"
    assert complaint(text).startswith(":5: research.original.selection.explore: is for models from scratch")


def test_a_recipe_with_research_is_written_and_read_back(tmp_path):
    recipe = training.build({"task": "pretrain"}, ["research.original.staged.phases=[0.5,1]"])
    path = tmp_path / "dumped.yaml"
    path.write_text(training.dump(recipe))
    assert "research:\n  original:\n    staged:\n      phases: [0.5, 1.0]\n" in path.read_text()
    assert training.load(str(path)) == recipe != training.build({"task": "pretrain"})
    assert "research" not in training.dump(training.build({"task": "pretrain"}))


def test_a_run_goes_on_with_the_same_research_only():
    plain, noise = training.build({"task": "pretrain"}), "research.original.selection.explore=noise"
    explored = training.build({"task": "pretrain"}, [noise])
    other = training.build({"task": "pretrain"}, [noise, "research.original.selection.until=0.5"])
    assert changed(explored, explored) is None
    assert changed(explored, other) == "research.original.selection.until (0.4, now 0.5)"
    assert changed(plain, explored).startswith("research.original (None, now {")


def test_research_is_loaded_by_a_recipe_that_names_it_and_by_no_other():
    code = (
        "import sys; from pilon_compress.config import training; import pilon_compress.train.pipeline\n"
        "told = lambda: print(sorted(name for name in sys.modules if '.research.original' in name))\n"
        "training.load('tiny'); told(); training.load('original'); told()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = done.stdout.splitlines()
    assert before == "[]" and "pilon_compress.research.original.settings" in after
