"""Exporters: which forms there are, what each refuses, and what its options apply to."""

import json

import pytest
import torch

from pilon_compress.config.export import ExportOptions
from pilon_compress.errors import BadInput
from pilon_compress.export.registry import EXPORTERS, FLAGS, exporter
from pilon_compress.export.run import export, targets
from pilon_compress.export.save import save_model
from pilon_compress.models.families import find_sites
from pilon_compress.nn.init import initialise
from pilon_compress.nn.install import install
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.specs import BankSpec, ProjectionSpec
from pilon_compress.results.export import Exported


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A PILON model in plain numbers, `plain`, and a dense one, `dense`."""
    place = tmp_path_factory.mktemp("export")
    model = tiny.tiny_model("llama")
    sites = find_sites(model)
    banks = {f"band{site.layer}.{site.role}": BankSpec(site.d_in, site.d_out, 3, 4) for site in sites}
    layout = Layout(banks, {site.name: ProjectionSpec(f"band{site.layer}.{site.role}", 2, site.bias) for site in sites})
    initialise(install(model, layout), 0.1, torch.Generator().manual_seed(0))
    (place / "plain").mkdir()
    save_model(model, tiny.tiny_tokenizer(), place / "plain", torch.float32)
    tiny.save_tiny("llama", place / "dense")
    return place


def test_every_option_has_a_flag():
    assert FLAGS == {
        "dtype": "--dtype",
        "encoding": "--format",
        "rest": "--rest",
        "type": "--type",
        "keep": "--keep",
        "calibration": "--calibration",
    }
    assert FLAGS.keys() == vars(ExportOptions()).keys() and all(
        {*one.options} <= FLAGS.keys() for one in EXPORTERS.values()
    )


@pytest.mark.parametrize(
    ("to", "options", "refused"),
    [
        ("onnx", {}, "no export target 'onnx'; there are .*native"),
        ("dense", {"rest": "int8"}, "--rest does not apply to an export to dense: it reads --dtype"),
        ("self-contained", {"dtype": "bfloat16"}, "--dtype does not apply to an export to self-contained"),
        ("packed", {}, "plain is not ternary: `pilon-compress train --heal"),
    ],
)
def test_nothing_is_written_where_an_export_is_refused(folder, tmp_path, to, options, refused):
    with pytest.raises(BadInput, match=refused):
        export(str(folder / "plain"), tmp_path / "out", to, ExportOptions(**options))
    assert not list(tmp_path.iterdir())


def test_the_list_says_who_takes_a_model_and_why_not(folder, cli):
    said = {one.target: one.reason for one in targets(str(folder / "plain"))}
    assert said.keys() == EXPORTERS.keys()
    assert said["dense"] == said["self-contained"] == "" and said["packed"].startswith("is not ternary")
    done = cli("export", "plain", "--list", cwd=folder)
    assert all(name in done.stdout for name in EXPORTERS) and "not ternary" in done.stdout
    told = json.loads(cli("export", "plain", "--list", "--json", cwd=folder).stdout)
    assert {one["target"]: one["reason"] for one in told["targets"]} == said
    assert sorted(path.name for path in folder.iterdir()) == ["dense", "plain"]
    refused = cli("export", "dense", "--list", cwd=folder, code=2)
    assert "is a dense model already" in refused.stderr


def test_the_command_asks_for_what_is_missing(folder, cli):
    assert (
        "--to: compressed-tensors, deci, dense, gguf, native, packed, pilon, self-contained"
        in cli("export", "plain", "-o", "x", cwd=folder, code=2).stderr
    )
    base4 = cli("export", "plain", "--to", "packed", "--format", "base4", "-o", "x", cwd=folder, code=2)
    assert "--format: must be 'base3' or '2bit' (got 'base4')" in base4.stderr
    assert "with -o" in cli("export", "plain", "--to", "dense", cwd=folder, code=2).stderr


def test_an_exporter_is_one_registration(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(EXPORTERS, "_entries", dict(EXPORTERS))

    class Counted(Exported):
        parameters: int

    @exporter("sizes", about="Its number of parameters.", load="open({folder!r})", refuse=lambda model, options: None)
    def write(model, job):
        job.output.mkdir()
        (job.output / "sizes.txt").write_text(str(model.num_parameters()))
        return Counted(parameters=model.num_parameters())

    found = export(str(folder / "plain"), tmp_path / "out", "sizes").dump()
    assert found["to"] == "sizes" and found["load"] == f"open({str(tmp_path / 'out')!r})"
    assert (tmp_path / "out" / "sizes.txt").read_text() == str(found["parameters"])
    assert "sizes" in [one.target for one in targets(str(folder / "plain"))]
