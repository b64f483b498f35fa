"""Whatever byte is hit, and whatever a file of ours says: one line, or the work is made again with one line."""

import copy
import json

import pytest
import torch

from pilon_compress.config import strict_yaml
from pilon_compress.convert.allocate.budget import Allocation
from pilon_compress.convert.solve.bank_fit import BankFit
from pilon_compress.data import token_files
from pilon_compress.errors import BadInput
from pilon_compress.io.journal import Journal
from pilon_compress.models import provenance
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.specs import BankSpec, DenseSpec, ProjectionSpec
from pilon_compress.optimize.checkpoints import Checkpoints
from pilon_compress.parallel import World

VALUES = ({}, [], None, -1, 0, 3, "x", 1e9, True, 10**12, [1, 2, 3])
LAYOUT = Layout(
    banks={"band0.up": BankSpec(8, 16, 4, 2)},
    projections={"h.0.up": ProjectionSpec("band0.up", 2, True, "scalar", 4)},
    matrices={"h.0.down": DenseSpec(16, 8, True, "int4")},
    host={"h.0.down": (32, 8)},
    rest={"wte": "embedding"},
)


def places(data, path=()):
    yield path
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield from places(data[key], (*path, key))


def changed(data, path, value):
    if not path:
        return value
    made = copy.deepcopy(data)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return made


def test_every_change_of_a_layout_is_refused_or_is_a_layout():
    whole = json.loads(json.dumps(LAYOUT.to_dict()))
    assert Layout.from_dict(whole) == LAYOUT
    refused = 0
    for path in places(whole):
        for value in VALUES:
            try:
                read = Layout.from_dict(changed(whole, path, value))
            except ValueError as error:
                refused += 1
                assert "\n" not in str(error)
            else:
                assert Layout.from_dict(json.loads(json.dumps(read.to_dict()))) == read
    assert refused > 200


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("banks", {"keys": {"d_in": 1, "d_out": 1, "n_primitives": 1, "rank": 1}}),
        ("banks", {"": {"d_in": 1, "d_out": 1, "n_primitives": 1, "rank": 1}}),
        ("banks", {"band0.up.x": {"d_in": 1, "d_out": 1, "n_primitives": 1, "rank": 1}}),
        ("banks", {"b": {"d_in": 1 << 25, "d_out": 1, "n_primitives": 1 << 25, "rank": 1 << 25}}),
        ("kept", {"h.0.up": {"d_in": 8, "d_out": 16, "bias": True}}),
        ("host", {"nowhere": [1, 1]}),
        ("rest", {"wte": "pickle"}),
        ("projections", {"h.0.up": {"bank": "band0.up", "top_k": 5, "bias": True}}),
    ],
)
def test_parts_that_contradict_each_other_are_refused(part, entry):
    whole = json.loads(json.dumps(LAYOUT.to_dict()))
    with pytest.raises(ValueError):
        Layout.from_dict(changed(whole, (part,), {**whole[part], **entry}))


def flips(path, step=1):
    """The file with one bit flipped, at one place after the other; whole again at the end."""
    whole = path.read_bytes()
    for place in range(0, len(whole), step):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        yield place
    path.write_bytes(whole)


def test_a_damaged_journal_entry_is_made_again_with_a_line(tmp_path, said):
    journal = Journal(tmp_path / "out", "mark")
    journal.put("one", {"a": torch.arange(6.0)})
    for name in ("one.safetensors", "one.sha256"):
        for place in flips(tmp_path / ".out.partial" / name, 5):
            assert Journal(tmp_path / "out", "mark").get("one") is None, (name, place)
            assert len(said()) == 1
    assert journal.get("one") is not None


@pytest.mark.parametrize("read", [Allocation.unpack, BankFit.unpack])
def test_an_entry_that_is_another_thing_is_made_again(tmp_path, said, read):
    journal = Journal(tmp_path / "out", "mark")
    for tensors in (
        {"a": torch.ones(1)},
        {"plain": torch.ones(3)},
        {"plain": torch.tensor([91, 93], dtype=torch.uint8)},
    ):
        journal.put("one", tensors)
        assert journal.get("one", read) is None and "computing it again" in said()[0]


def test_a_damaged_fingerprint_drops_the_journal_with_a_line(tmp_path, said):
    Journal(tmp_path / "out", "mark").put("one", {"a": torch.ones(1)})
    (tmp_path / ".out.partial" / "fingerprint").write_bytes(b"\xff")
    assert Journal(tmp_path / "out", "mark").get("one") is None
    assert len(said()) == 1


def test_a_damaged_token_file_is_made_again_with_a_line(tiny, tmp_path, said):
    (tmp_path / "text.txt").write_text("one two three\n\nfour five six\n\n" * 40)

    def made():
        return token_files.tokenise(str(tmp_path / "text.txt"), tiny.tiny_tokenizer(), "all", tmp_path / "cache")

    first = made()
    ids = first.ids.tolist()
    assert said() == []
    for name in ("tokens.bin", "starts.bin", "about.json", "manifest.json"):
        for place in flips(first.folder / name, 400):
            assert made().ids.tolist() == ids, (name, place)
            (line,) = said()
            assert "tokenising the text again" in line
    assert made().starts.tolist() == first.starts.tolist()


@pytest.mark.parametrize("name", ["state.json", "manifest.json", "shard"])
def test_a_damaged_checkpoint_is_refused_and_says_what_to_delete(tmp_path, name):
    checkpoints = Checkpoints(tmp_path, World(0, 1, torch.device("cpu")))
    plain = {"tokens": 1, "seconds": 1.0, "halvings": 0, "restarted": 0.0, "mean": None, "best": None, "before": None}
    for step in (1, 2):
        checkpoints.save(step, {"model.a": torch.arange(4.0)}, plain)
    assert checkpoints.plain(2)["tokens"] == 1
    path = checkpoints.path(2)
    path = next(path.glob("*.safetensors")) if name == "shard" else path / name
    for place in flips(path, 37):
        try:
            assert checkpoints.plain(2)["step"] == 2 and name == "manifest.json", place  # hit beside the checksums
        except BadInput as error:
            assert "delete" in str(error) and "go on from step 1" in str(error) and "\n" not in str(error), place


BOMB = ["a0: &a0 [x,x,x,x,x,x,x,x,x]", *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(BOMB),
        "a: &a [*a]",
        "[" * 5000,
        "a: " * 50 + "b",
        "#" * (1 << 20),
        "\n".join(f"k{i}: 1" for i in range(20_000)),
    ]
    + ["a: &a {x: &b [1, 1]}\nb: [" + "*a," * 9_000 + "]"],
    ids=["aliases", "circle", "deep", "deep flow", "long", "keys", "flat aliases"],
)
def test_yaml_without_bounds_is_refused_at_once(text):
    with pytest.raises(BadInput) as caught:
        strict_yaml.parse(text, "r.yaml")
    assert "\n" not in str(caught.value)


def test_aliases_in_a_recipe_of_ordinary_size_are_read():
    assert strict_yaml.parse("a: &a [1, 2]\nb: *a", "r.yaml").data == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 100_000, "\udcff", '{"source": 3}'])
def test_a_damaged_report_beside_a_model_is_one_line_or_tells_nothing(tmp_path, text):
    (tmp_path / "report.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    try:
        assert provenance.lineage(tmp_path) == provenance.Lineage()
    except BadInput as error:
        assert "\n" not in str(error) and "report.json" in str(error)
