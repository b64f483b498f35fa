"""Heads: logits from hidden states are the model's own, whatever its code does between the two."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pilon_compress.data.batch import Batch
from pilon_compress.distill.losses import NextToken
from pilon_compress.distill.students import CausalStudent
from pilon_compress.distill.teacher import Teacher
from pilon_compress.models.forward import run_base
from pilon_compress.models.head import Head

SMALL = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN = {"llama": {}, "gpt2": {}, "gemma2": {"head_dim": 8}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}}
OTHER = {
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.1},
    "bert": {"is_decoder": True},
    "roberta": {"is_decoder": True},
}
IDS = torch.randint(5, 100, (3, 9), generator=torch.Generator().manual_seed(0))


def small(family, seed=0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **SMALL, **({**PLAIN, **OTHER})[family])
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", [*PLAIN, *OTHER])
def test_a_head_gives_the_models_own_logits(family):
    model = small(family)
    head = Head(model.train())  # dropout is no reason to take it for another
    assert head.is_plain == (family in PLAIN) and model.training and head.out_features == 120
    model.eval()
    with torch.no_grad():
        own = model(IDS, use_cache=False).logits
        hidden = run_base(model, Batch(IDS)).last_hidden_state
        torch.testing.assert_close(head(hidden.flatten(0, 1)).view_as(own), own)
        torch.testing.assert_close(model(IDS, use_cache=False).logits, own)


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_students_and_losses_use_the_models_own_logits(family):
    model, dense = small(family, 1), small(family)
    labels = IDS.roll(-1, 1)
    batch = Batch(IDS, labels=labels)
    with torch.no_grad():
        ours, theirs = (one(IDS, use_cache=False).logits.log_softmax(-1) for one in (model, dense))
    nats = -ours.gather(-1, labels[..., None]).sum()
    kl = (theirs.exp() * (theirs - ours)).sum()
    torch.testing.assert_close(NextToken(model)(batch.inputs(), labels), nats)
    student, teacher = CausalStudent(model, next_token=True), Teacher(dense)
    wanted = teacher.wanted(batch)
    for terms, expected in (((1.0, 0.0, 0.0, 0.0), kl), ((0.0, 1.0, 0.0, 0.0), nats)):
        loss = student(batch.inputs(), labels, wanted, torch.tensor(terms))
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-4)
    assert teacher.nats(batch) == pytest.approx(float(-theirs.gather(-1, labels[..., None]).sum()), rel=1e-5)


def test_gradients_pass_through_a_head_that_is_more_than_a_matrix():
    model = small("bert")
    hidden = torch.randn(4, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(Head(model)(hidden).square().sum(), hidden)
    assert gradient.abs().sum() > 0
