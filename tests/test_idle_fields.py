"""Fields of a training that another field switches off: refused, or said in one line where a control needs the rest."""

import pytest

from pilon_compress.config import training
from pilon_compress.config.training_calls import TrainConfig
from pilon_compress.errors import BadInput

HEAL = ("task=heal", "start=converted")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["distill.temperature=2"], "distill.temperature: has no effect with task pretrain, which distils nothing"),
        (["distill.keep_best=false"], "distill.keep_best: has no effect with task pretrain"),
        (["teacher=gpt2"], "teacher: has no effect with task pretrain"),
        ([*HEAL, "distill.kl=0", "distill.temperature=2"], "distill.temperature: has no effect with distill.kl 0"),
        ([*HEAL, "host.hidden_size=64"], "host.hidden_size: has no effect with task heal, whose model is there"),
        ([*HEAL, "ffn.rank=8"], "ffn.rank: has no effect with task heal"),
        (["ternary.group=64"], "ternary.group: has no effect with ternary.enabled false"),
        (["ternary.enabled=true", "ternary.after=0.5"], "ternary.after: has no effect with task pretrain"),
        (["ffn.dense_after=0.5"], "ffn.dense_after: has no effect with ffn.dense_until 0"),
        (["data.chat_template=a.jinja"], "data.chat_template: has no effect with task pretrain"),
        (["optimizer.muon_learning_rate=0.01"], "optimizer.muon_learning_rate: has no effect with optimizer.name"),
        (["schedule.kind=constant", "schedule.decay=0.5"], "schedule.decay: has no effect with schedule.kind constant"),
        ([*HEAL, "schedule.floor=0.1", "schedule.kind=constant"], "schedule.floor: has no effect with schedule.kind"),
        (["research.original.selection.until=0.2"], "selection.until: has no effect with selection.explore none"),
        (["research.bitnet.warmup=0.2"], "research.bitnet.warmup: has no effect with ternary.enabled false"),
    ],
)
def test_a_field_without_effect_is_refused(overrides, told):
    with pytest.raises(BadInput) as refusal:
        training.build({} if "task=heal" in overrides else {"task": "pretrain"}, overrides)
    assert told in str(refusal.value) and "leave out one of the two" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_option_that_was_typed_is_named(cli):
    done = cli("train", "--recipe", "smoke", "--temperature", "2", "--dry-run", code=2)
    assert done.stderr.startswith("error: --temperature: has no effect with task pretrain, which distils nothing")


def test_a_control_of_the_same_recipe_says_what_it_leaves_out(cli):
    plain = cli("train", "--recipe", "smoke", "--dry-run").stderr
    done = cli("train", "--recipe", "smoke", "--set", "ffn.rank=8", "--ffn", "dense", "--dry-run")
    assert "no effect" not in plain and "ffn.rank: has no effect with ffn.kind dense\n" in done.stderr


def test_a_control_of_another_models_layout_says_what_it_leaves_out_and_is_dense_at_no_time():
    recipe = training.load("tiny", ["ffn.like=converted", "ffn.rank=8"])
    (said,) = training.idle(recipe)
    assert "host.hidden_size" in said and "ffn.dense_until, ffn.rank: has no effect with ffn.like" in said
    assert not recipe.warm and training.load("tiny").warm


def test_a_chat_template_is_for_chats_in_python_too():
    assert TrainConfig(chat_template="chat.jinja").recipe("model").task == "sft"
    with pytest.raises(BadInput, match="chat_template: has no effect with task pretrain"):
        TrainConfig(chat_template="chat.jinja").recipe(None)
