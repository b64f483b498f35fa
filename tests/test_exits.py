"""Exit gates: blocks that tokens skip, their files, exports and refusals; training of gates, and what it promises."""

import copy
import json
import math

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import pilon_compress  # noqa: F401  registers the quantisation method
from pilon_compress.errors import BadInput
from pilon_compress.export.dense import to_dense
from pilon_compress.export.packed import packed
from pilon_compress.export.run import export
from pilon_compress.export.save import save_model
from pilon_compress.models.families import find_sites
from pilon_compress.models.layouts import dense_layout
from pilon_compress.nn.exits import ExitGate, add_gate, drop_gates, gated_blocks
from pilon_compress.nn.init import initialise
from pilon_compress.nn.install import install
from pilon_compress.nn.installed import layout_of
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.size import ffn_size
from pilon_compress.nn.specs import ExitSpec

IDS = torch.randint(6, 200, (3, 17), generator=torch.Generator().manual_seed(3))
PLACES = {"llama": "layers.{}.mlp", "gpt2": "h.{}.mlp", "phi3": "layers.{}.mlp", "gemma3_text": "layers.{}.mlp"}


def plain(tiny, family, quantization="none"):
    """A model whose projections are dense matrices, with random weights."""
    model = tiny.tiny_model(family)
    install(model, dense_layout(find_sites(model)).in_format(quantization))
    initialise(model, 0.2, torch.Generator().manual_seed(1))
    return model.eval()


def gated(tiny, family="llama", substitute=0, **options):
    """`plain` with random gates that let about half of the tokens skip each block."""
    model = plain(tiny, family, **options)
    generator = torch.Generator().manual_seed(2)
    for layer in range(3):
        gate = ExitGate(32, 0.05 * layer, substitute)
        for name, tensor in gate.named_buffers():
            if name != "bias":
                tensor.normal_(0, 0.5, generator=generator)
        add_gate(model.base_model.get_submodule(PLACES[family].format(layer)), gate)
    return model


def decisions(model, **inputs):
    """The gates' decisions (layers, tokens) in one pass, and the logits."""
    seen = []
    hooks = [
        block.exit_gate.register_forward_hook(lambda *call: seen.append(call[2])) for _, block in gated_blocks(model)
    ]
    with torch.no_grad():
        logits = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return torch.stack([one.reshape(-1) for one in seen]), logits


@pytest.mark.parametrize("substitute", [0, 4])
@pytest.mark.parametrize("family", PLACES)
def test_skipping_tokens_equals_the_block_token_by_token(tiny, family, substitute):
    model = gated(tiny, family, substitute)
    skipped, logits = decisions(model, input_ids=IDS)
    assert 0.1 < skipped.float().mean() < 0.9
    assert len(list(gated_blocks(model))) == 3
    reference = copy.deepcopy(model)
    gates = {name: block.exit_gate for name, block in gated_blocks(reference)}
    assert drop_gates(reference) == 3 and not layout_of(reference).exits

    def choose(gate):
        def hook(block, args, out):
            (x,) = args
            rows = []
            for row, made in zip(x.reshape(-1, 32), out.reshape(-1, 32), strict=True):
                other = gate.mean + (row @ gate.down @ gate.up if substitute else 0)
                rows.append(other if row @ gate.weight + gate.bias < gate.threshold else made)
            return torch.stack(rows).reshape(out.shape)

        return hook

    for name, gate in gates.items():
        reference.base_model.get_submodule(name).register_forward_hook(choose(gate))
    with torch.no_grad():
        torch.testing.assert_close(logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)


def test_the_block_computes_the_kept_tokens_alone(tiny):
    model = gated(tiny)
    rows = []
    for name, block in gated_blocks(model):
        block.down_proj.register_forward_hook(lambda module, args, out, name=name: rows.append(args[0][..., 0].numel()))
    skipped, _ = decisions(model, input_ids=IDS)
    assert rows == (~skipped).sum(1).tolist()


def test_a_mask_gives_the_same_numbers_in_training_and_when_compiled(tiny):
    model = gated(tiny, substitute=4)
    with torch.no_grad():
        expected = model(IDS).logits
        model.train()
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        block = next(block for _, block in gated_blocks(model.eval()))
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4))
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_kept_tokens_and_not_into_gates(tiny):
    model = gated(tiny)
    for mode in (model.train, model.eval):
        model.zero_grad()
        mode()(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert not any("exit_gate" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cached_decoding_equals_the_full_pass(tiny, family):
    model = gated(tiny, family, substitute=4)
    with torch.no_grad():
        whole = model(IDS).logits
        cache, steps = None, []
        for place in range(IDS.shape[1]):
            out = model(IDS[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_left_padding_changes_no_token(tiny):
    model = gated(tiny)
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), IDS], 1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.long), torch.ones_like(IDS)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
        torch.testing.assert_close(found, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_files_hold_the_gates(tiny, tmp_path, family, dtype):
    model, place = gated(tiny, family, substitute=4), PLACES[family].format(2)
    save_model(model, tiny.tiny_tokenizer(), tmp_path / "out", dtype)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    entry = config["quantization_config"]["layout"]["exits"][place]
    assert entry == {"d": 32, "threshold": 0.1, "substitute": 4}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    assert layout_of(loaded) == layout_of(model)
    gate, before = (one.base_model.get_submodule(place).exit_gate for one in (loaded, model))
    assert torch.equal(gate.weight, before.weight)  # never rounded
    assert torch.equal(gate.mean, before.mean.to(dtype)) and torch.equal(gate.down, before.down.to(dtype))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert sum("exit_gate" in name for name in file.keys()) == 3 * 5  # noqa: SIM118
    save_model(loaded, tiny.tiny_tokenizer(), tmp_path / "again", dtype)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype).eval()
    once, twice = decisions(loaded, input_ids=IDS), decisions(again, input_ids=IDS)
    assert torch.equal(once[0], twice[0]) and torch.equal(once[1], twice[1])


def test_a_gate_whose_tensors_are_lost_or_broken_is_refused(tiny, tmp_path):
    save_model(gated(tiny), tiny.tiny_tokenizer(), tmp_path / "out", torch.float32)

    def lose(tensors, config):
        del tensors["model.layers.1.mlp.exit_gate.weight"]

    def poison(tensors, config):
        tensors["model.layers.1.mlp.exit_gate.mean"][3] = float("nan")

    for name, damage, words in (("lost", lose, "lacks 1 PILON tensors"), ("nan", poison, "not finite")):
        tiny.damaged(tmp_path / "out", tmp_path / name, damage)
        with pytest.raises(ValueError, match=words):
            AutoModelForCausalLM.from_pretrained(tmp_path / name)


@pytest.mark.parametrize(
    ("exits", "words"),
    [
        ({"layers.0.mlp": {"threshold": 0.0}}, "lacks d"),
        ({"layers.0.mlp": {"d": 32, "threshold": math.inf}}, "is no number"),
        ({"layers.0.mlp": {"d": 32, "threshold": 1}}, "must be float"),
        ({"layers.0.mlp": {"d": 32, "substitute": -1}}, "which no model has"),
        ({"layers.0.self_attn": {"d": 32}}, "of which it replaces no projection"),
        ({"layers.0.mlp": {"d": 32, "kind": "mlp"}}, "newer pilon-compress"),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(tiny, exits, words):
    layout = layout_of(plain(tiny, "llama")).to_dict()
    with pytest.raises(ValueError, match=words):
        Layout.from_dict({**layout, "exits": exits})


def test_sizes_count_gates(tiny):
    model = gated(tiny, substitute=4)
    without, layout = ffn_size(layout_of(plain(tiny, "llama"))), layout_of(model)
    with_gates = ffn_size(layout)
    numbers = sum(tensor.numel() for _, block in gated_blocks(model) for tensor in block.exit_gate.buffers())
    assert with_gates.stored - without.stored == numbers
    assert with_gates.macs - without.macs == 3 * 32
    assert Layout.from_dict(layout.to_dict()) == layout


def test_ternary_models_keep_their_gates_when_packed(tiny):
    model = gated(tiny, quantization="ternary", substitute=4)
    before = decisions(model, input_ids=IDS)
    after = decisions(packed(model, "base3"), input_ids=IDS)
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(before[1], after[1])
    assert layout_of(model).exits == {f"layers.{i}.mlp": ExitSpec(32, 0.05 * i, 4) for i in range(3)}


def test_exports_to_dense_refuse_gates(tiny):
    with pytest.raises(BadInput, match="has exit gates"):
        to_dense(gated(tiny))


def test_blocks_of_another_form_are_refused(tiny):
    model = tiny.tiny_model("bert")
    with pytest.raises(ValueError, match="takes hidden states alone"):
        add_gate(model.base_model.get_submodule("encoder.layer.0.output"), ExitGate(32))


def test_a_self_contained_folder_brings_its_gates(tiny, tmp_path, bare):
    save_model(gated(tiny, substitute=4), tiny.tiny_tokenizer(), tmp_path / "out", torch.float32)
    export(str(tmp_path / "out"), tmp_path / "alone", "self-contained")
    script = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("alone", trust_remote_code=True)
torch.save(model(torch.arange(6, 40)[None]).logits, "logits.pt")
"""
    bare.python(script, cwd=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(torch.arange(6, 40)[None]).logits)
