"""Check the report of a training: a self-contained page, its picture, a card, and measured figures alone."""

import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import matplotlib.image
import pytest
from huggingface_hub import ModelCard

from pilon_compress.config import training
from pilon_compress.report import formatting, training_curves
from pilon_compress.report.card import training_card as model_card
from pilon_compress.report.training_page import PAGE, PICTURE, marks, page, samples, write_pages

HOSTILE = "<script>alert(1)</script> & `x` | $y$ \"'"


def settings(**sections):
    return training.build({"task": "pretrain", **sections})


def lines(count=30, health=True, sample="Once"):
    found = []
    for step in range(1, count + 1):
        line = {"step": step, "loss": 6 - step / count, "tokens": 1000 * step, "tokens_per_second": 5e3 + step}
        line |= {"rate": min(1, step / 5), "gradient_norm": 1.0}
        line |= {f"gradient_norm_{group}": 10.0 ** -(step % 4) for group in ("banks", "matrices")}
        found.append(line)
        if step % 10 == 0:
            judged = {"step": step, "tokens": 1000 * step, "val_perplexity": 300 / step, "sample": f"{sample} {step}"}
            use = dict.fromkeys(("composition_entropy", "primitive_entropy", "primitive_gini", "dead_share"), 0.25)
            found.append(judged | (use | {"utilisation": 0.8125} if health else {}))
    return found


def result(asked, dense=False, **changes):
    ratios = {"stored_ratio": 0.493, "bytes_ratio": 0.494, "mac_ratio": 0.487}
    found = {
        "format_version": 1,
        "pilon_compress": "0.1.0",
        "task": asked.task,
        "data": "stdlib:topics",
        "val_perplexity": 142.7,
        "best_val_perplexity": 139.3,
        "steps": 128,
        "tokens": 131_072,
        "seconds": 18.41,
        "tokens_per_second": 7119.2,
        "parameters": 1_234_567,
        "ffn": dict.fromkeys(ratios, 1.0) if dense else ratios,
        "processes": 1,
        "device": "cpu",
        "command": "pilon-compress train --recipe smoke -o out",
        "recipe": training.dump(asked),
        "output": "out",
    }
    return found | ({} if dense else {"model": {key: value + 0.1 for key, value in ratios.items()}}) | changes


class Checker(HTMLParser):
    """Tags that are closed as they were opened, and no script, link or image from elsewhere."""

    VOID = ("meta", "br", "link", "img", "i")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on")
            assert name not in ("src", "href") or (value or "").startswith(("#", "train.json", "metrics.jsonl"))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def words(text):
    return " ".join(" ".join(Checker(re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)).words).split())


@pytest.mark.parametrize("kind", ["pilon", "lowrank", "dense"])
def test_the_page_is_self_contained_and_shows_every_headline_number(kind):
    asked = settings(ffn={"kind": kind})
    text = page(result(asked, kind == "dense"), asked, lines(health=kind == "pilon"))
    checked = Checker(text)
    assert not {"script", "iframe", "object", "form"} & set(checked.tags) and "url(http" not in text
    shown = words(text)
    numbers = ["143", "139", "131 K", "7,119", "1.23 M", "18.4"] + ([] if kind == "dense" else ["0.493", "0.487"])
    for number in (*numbers, "stdlib:topics", "pilon-compress train --recipe smoke -o out"):
        assert number in shown, number
    assert ("0.812" in shown) == (kind == "pilon")
    assert "Once 10" in shown and "Once 30" in shown


def test_the_curves_are_one_well_formed_drawing_with_a_panel_for_each_question():
    whole = training_curves.svg(lines(), [(4000.0, "phase 2")])
    root = ET.fromstring(whole)
    panels = [one for one in root.iter() if re.fullmatch(r"curves-axes_\d+", one.get("id", ""))]
    assert len(panels) == 6
    few = ET.fromstring(training_curves.svg([line for line in lines(health=False) if "loss" in line]))
    assert "validation" not in training_curves.svg([]) and few is not None
    drawn = [one for one in few.iter() if re.fullmatch(r"curves-axes_\d+", one.get("id", ""))]
    assert len(drawn) == 4


def test_the_picture_is_a_png_as_wide_as_the_page_and_the_same_every_time():
    found = training_curves.png(lines(), [(4000.0, "phase 2")])
    assert found == training_curves.png(lines(), [(4000.0, "phase 2")])
    picture = matplotlib.image.imread(io.BytesIO(found))
    assert picture.shape[1] == 1560
    left, right = (picture[:, columns, :3] for columns in (slice(0, 3), slice(-3, None)))
    assert (left == 1).all() and (right == 1).all(), "nothing is cut off at the edge"


@pytest.mark.parametrize("count", [0, 1, 3, 900])
def test_runs_of_any_length_are_drawn(count):
    assert training_curves.png(lines(count)) and training_curves.svg(lines(count))


def test_figures_that_are_not_finite_are_left_out():
    broken = lines()
    broken[3]["loss"], broken[4]["gradient_norm_banks"] = float("nan"), float("inf")
    broken[10]["val_perplexity"] = float("inf")
    assert "nan" not in training_curves.svg(broken).lower()


def test_a_running_mean_has_the_ends_of_what_it_smooths():
    assert training_curves.smoothed([0, 2, 4, 6, 20], 2) == pytest.approx([0, 2, 6.4, 10, 20])
    assert training_curves.smoothed([5], 3) == [5]


def test_changes_in_the_training_are_marked_where_they_happened():
    asked = settings(
        research={"original": {"staged": {"phases": [0.2, 0.5, 1.0]}, "selection": {"explore": "noise", "until": 0.3}}}
    )
    assert marks(asked, lines()) == [(6000, "phase 2"), (9000, "choice final"), (15000, "phase 3")]
    assert "phase 2, choice final, phase 3" in words(page(result(asked), asked, lines()))
    assert marks(settings(), lines()) == []


def test_a_few_samples_from_first_to_last():
    many = [{"step": step, "tokens": step, "sample": f"s{step}"} for step in range(10)]
    assert samples(many) == [(0, "s0"), (3, "s3"), (6, "s6"), (9, "s9")]
    assert samples(many[:2]) == [(0, "s0"), (1, "s1")] and samples([]) == []


def test_hostile_text_is_text_and_nothing_else():
    asked = settings(data={"source": HOSTILE})
    hostile = result(asked, data=HOSTILE, command=HOSTILE, output=HOSTILE)
    text = page(hostile, asked, lines(sample=HOSTILE))
    assert "script" not in Checker(text).tags
    assert HOSTILE in words(text)
    card = model_card(hostile, asked)
    assert f"`` {HOSTILE} ``" in card or f"``{HOSTILE}``" in card


def test_pages_are_written_and_the_same_figures_give_the_same_bytes(tmp_path):
    asked = settings()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_pages(result(asked), asked, json.loads(json.dumps(lines())), tmp_path / name)
    for name in (PAGE, PICTURE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one" / PAGE).stat().st_size < 400_000


# --- the card


def test_the_card_states_the_measured_figures_the_command_and_the_recipe():
    asked = settings()
    card = model_card(result(asked), asked)
    for text in ("**143**", "131 K", "1.23 M", "**0.493**", "**0.494**", "**0.487**", "0.593", "`stdlib:topics`"):
        assert text in card, text
    assert training.dump(asked).rstrip() in card and "pilon-compress train --recipe smoke -o out" in card
    assert f"({PICTURE})" in card and f"`{PAGE}`" in card
    numbers = set(re.findall(r"\*\*([\d.,]+)\*\*", card))
    assert numbers == {formatting.number(value) for value in (142.7, 0.493, 0.494, 0.487)}


def test_front_matter_names_the_base_only_where_it_is_on_the_hub():
    def front(asked, **changes):
        card = model_card(result(asked, **changes), asked)
        return ModelCard(card).data.to_dict()

    found = front(settings())
    (measured,) = found.pop("model-index")[0]["results"]
    assert measured["metrics"] == [{"type": "perplexity", "value": 142.7, "name": "Perplexity"}]
    assert found == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["pilon"]}
    tuned = training.build({"task": "sft", "start": "acme/small"})
    assert front(tuned)["base_model"] == "acme/small"
    local = training.build({"task": "heal", "start": "./out/half"})
    assert "base_model" not in front(local)
    assert ModelCard(model_card(result(local), local, True, "acme/small")).data.base_model == "acme/small"
    assert front(settings(ffn={"kind": "dense"}), dense=True)["tags"] == ["pilon-compress"]


def test_loading_code_compiles_and_a_dense_model_needs_no_package():
    for dense in (False, True):
        asked = settings(ffn={"kind": "dense"} if dense else {})
        code = re.search(r"```python\n(.*?)```", model_card(result(asked, dense), asked), re.DOTALL)[1]
        compile(code, "card", "exec")
        assert ("import pilon_compress" in code) != dense


def test_what_was_done_is_said_of_every_task():
    said = {
        "from random weights": settings(),
        "distilled from acme/dense": training.build({"task": "heal", "start": "x", "teacher": "acme/dense"}),
        "fine-tuned on conversations": training.build({"task": "sft", "start": "x"}),
    }
    for text, asked in said.items():
        assert text in model_card(result(asked), asked)
        assert text in words(page(result(asked), asked, lines()))
