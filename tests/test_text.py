"""Text sources: the same documents every time, two parts that never mix, one clear line for what cannot be read."""

import io
import json
import pydoc_data.topics
import subprocess
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pilon_compress.data import text
from pilon_compress.data.readers import stdin
from pilon_compress.data.split import split_items
from pilon_compress.errors import BadInput

DOCUMENTS = [f"Document {i}: naïve café.\nIts second line." for i in range(40)]


def read(spec, part="all"):
    return list(text.open_text(str(spec), part))


def write(path, documents=DOCUMENTS, column="text"):
    rows = [{"id": i, column: document} for i, document in enumerate(documents)]
    if path.suffix == ".txt":
        path.write_text("\n\n".join(documents), "utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), "utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def assert_refused(spec, *words, part="all"):
    with pytest.raises(BadInput) as error:
        read(spec, part)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "parquet"])
def test_every_file_format_gives_the_same_documents(tmp_path, suffix):
    assert read(write(tmp_path / f"t.{suffix}")) == DOCUMENTS


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_column_can_be_named(tmp_path, suffix):
    path = write(tmp_path / f"t.{suffix}", column="body")
    assert read(f"{path}::body") == DOCUMENTS
    assert_refused(path, "no column 'text'", "id, body")


def test_a_glob_reads_its_files_in_order(tmp_path):
    for name, part in (("b.txt", DOCUMENTS[20:]), ("a.jsonl", DOCUMENTS[:20])):
        write(tmp_path / name, part)
    assert read(tmp_path / "*") == DOCUMENTS


def test_txt_documents_lie_between_blank_lines_of_any_kind(tmp_path):
    (tmp_path / "t.txt").write_bytes("\ufeffone\r\nmore\r\n\r\n \t\r\ntwo\n\n\n\nthree\n".encode())
    assert [document.split() for document in read(tmp_path / "t.txt")] == [["one", "more"], ["two"], ["three"]]


def test_parts_do_not_overlap_and_are_the_same_on_every_machine(tmp_path):
    path = write(tmp_path / "t.jsonl")
    calibration, held_out = read(path, "calibration"), read(path, "held-out")
    assert sorted(calibration + held_out) == sorted(DOCUMENTS)
    assert [DOCUMENTS.index(document) for document in held_out] == [1, 14, 15, 20, 39]
    again = write(tmp_path / "reversed.jsonl", DOCUMENTS[::-1] * 2)
    assert set(read(again, "held-out")) == set(held_out), "neither order nor repetition moves a document"


def test_two_documents_are_enough_for_two_parts_and_one_is_not(tmp_path):
    path = write(tmp_path / "t.txt", [DOCUMENTS[0], DOCUMENTS[2]])
    assert sorted(read(path, "calibration") + read(path, "held-out")) == [DOCUMENTS[0], DOCUMENTS[2]]
    path.write_text("One short line.")
    assert read(path, "calibration") == ["One short line."]
    assert_refused(path, "held-out", "1 documents", part="held-out")


@pytest.mark.parametrize("mark", ["\n\n", "\n", " "])
def test_a_single_document_or_a_few_are_cut_so_that_some_text_is_held_out(tmp_path, mark):
    for seed in range(8):
        words = [f"Sentence {i} of text {seed} is about the fox and the dog." for i in range(300)]
        path = tmp_path / f"{seed}.jsonl"
        path.write_text(json.dumps({"text": mark.join(words)}))
        assert read(path) == [mark.join(words)]
        calibration, held_out = ("".join(read(path, part)) for part in ("calibration", "held-out"))
        assert len(calibration) + len(held_out) == len(mark.join(words))
        assert 0.05 <= len(held_out) / len(calibration) <= 0.7
        assert all(word[:-1] in calibration or word[:-1] in held_out for word in words), "cut within a sentence"


def test_one_large_document_among_small_ones_does_not_leave_a_part_without_text(tmp_path):
    for seed in range(8):
        large = " ".join(f"Large sentence {i} of {seed}." for i in range(5000))
        path = write(tmp_path / f"{seed}.jsonl", [*DOCUMENTS[:30], large])
        sizes = {part: sum(map(len, read(path, part))) for part in ("calibration", "held-out", "all")}
        assert sizes["calibration"] + sizes["held-out"] == sizes["all"] and sizes["held-out"] < sizes["calibration"]


def test_a_few_items_with_equal_keys_stay_together_and_leave_no_part_empty():
    for seed in range(12):
        items = [(f"Question {i % 3} of {seed}?", i) for i in range(9)]
        parts = [list(split_items(items, lambda item: item[0], part)) for part in ("calibration", "held-out")]
        assert sorted(sum(parts, [])) == sorted(items) and all(parts)
        assert not {key for key, _ in parts[0]} & {key for key, _ in parts[1]}
    assert list(split_items(items, lambda item: item[0], "all")) == items


def feed(monkeypatch, stream):
    """Make `stream` the standard input of this process."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
    stdin._kept.cache_clear()
    monkeypatch.setattr(stdin, "IN_MEMORY", 100)


@pytest.mark.parametrize("seekable", [True, False])
def test_standard_input_can_be_read_twice_by_one_run(monkeypatch, seekable):
    class Pipe(io.BytesIO):
        def seekable(self):
            return seekable

    feed(monkeypatch, Pipe("\n\n".join(DOCUMENTS).encode()))
    calibration, held_out = text.open_text("stdin", "calibration"), text.open_text("stdin", "held-out")
    assert sorted([*calibration, *held_out]) == sorted(DOCUMENTS)
    feed(monkeypatch, Pipe("\n\n".join(DOCUMENTS).encode()))
    mixed = list(zip(text.open_text("stdin"), text.open_text("stdin"), strict=True))
    assert mixed == list(zip(DOCUMENTS, DOCUMENTS, strict=True)), "two readers at once"
    before = text.fingerprint("stdin")
    feed(monkeypatch, Pipe("\n\n".join(DOCUMENTS[1:]).encode()))
    assert text.fingerprint("stdin") != before
    feed(monkeypatch, Pipe(b"caf\xe9"))
    assert_refused("stdin", "stdin", "UTF-8", "byte 3")
    stdin._kept.cache_clear()


def test_standard_library_prose_is_long_and_deterministic():
    code = "from pilon_compress.data.text import open_text; import json; print(json.dumps(list(open_text('stdlib'))))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    documents = read("stdlib")
    assert json.loads(other.stdout) == documents and other.stderr == b""
    topics = [value for _, value in sorted(pydoc_data.topics.topics.items())]
    docstrings = documents[len(topics) :]
    assert documents[: len(topics)] == topics == read("stdlib:topics")
    assert next(text.open_text("stdlib:docstrings")) == docstrings[0]
    assert all(len(document) >= 200 for document in docstrings) and len(docstrings) > 1000
    assert any("urlopen" in document for document in docstrings)


def test_paragraphs_are_distinct_prose():
    prose = (
        "The first  paragraph is long enough to be kept,\nand it is made of words and of spaces rather than of signs."
    )
    table = "| 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 | 11 | 12 | 13 | 14 | 15 | 16 | 17 | 18 | 19 | 20 | 21 |"
    documents = [f"{prose}\n\nToo short.\n \n{table}", prose.replace("  ", " "), prose.replace("first", "second")]
    kept = list(text.paragraphs(documents))
    assert kept == [" ".join(prose.split()), " ".join(prose.split()).replace("first", "second")]
    assert list(text.paragraphs(documents, min_chars=10))[1] == "Too short."


def test_paragraphs_of_one_sentence_a_line_are_taken_though_they_are_short(said):
    short = [f"Line {'abcdefghij'[i]} is short." for i in range(10)]
    assert list(text.paragraphs([*short, short[0]])) == short
    assert "fewer than 80 characters" in said()[0]
    long = "This one is long enough to stand on its own, because it goes on and on about nothing in particular."
    assert list(text.paragraphs([short[0], long, *short[1:]])) == [long, *short], "nearly all are short"
    assert list(text.paragraphs([short[0], long, short[1]])) == [long], "the short ones are headings"
    assert list(text.paragraphs(["ประเทศไทยมีประชากรจำนวนมาก"])) == ["ประเทศไทยมีประชากรจำนวนมาก"]
    code = ["x[0] += f(y[1], z{2});", "for (i = 0; i < 9; i++) {}"]
    assert list(text.paragraphs(code)) == code
    assert "not prose" in said()[-1]


def test_a_few_long_paragraphs_are_cut_into_many():
    letters = "abcdefghijklmnopqrstuvwxyz"
    sentences = [f"Sentence {letters[i % 26]}{letters[i // 26]} is one of very many." for i in range(600)]
    cut = list(text.paragraphs([" ".join(sentences)]))
    assert len(cut) > 30 and " ".join(cut) == " ".join(sentences) and all(80 < len(part) < 400 for part in cut)
    short = [f"{sentence} And here is another sentence, so that it has full length." for sentence in sentences]
    *many, last = text.paragraphs([*short, " ".join(sentences)])
    assert many[:600] == short and len(last) > 400, "many paragraphs are cut only where they are extremely long"


def test_a_sample_depends_on_the_seed_alone():
    first, again, other = (text.sample(iter(DOCUMENTS), 10, seed) for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) == 10 and set(first) <= set(DOCUMENTS)
    assert sorted(text.sample(DOCUMENTS, 100, 0)) == sorted(DOCUMENTS)


def test_what_cannot_be_read_is_said_in_one_line(tmp_path):
    assert_refused(tmp_path / "nowhere.txt", "nowhere.txt", "stdlib", "stdin")
    assert_refused(tmp_path / "*.txt", "*.txt", "matches")
    assert_refused(tmp_path, str(tmp_path))
    (tmp_path / "t.docx").write_bytes(b"PK")
    assert_refused(tmp_path / "t.docx", "t.docx", ".jsonl")
    (tmp_path / "latin.txt").write_bytes("fine, then\n\ncaf\xe9".encode("latin-1"))
    assert_refused(tmp_path / "latin.txt", "latin.txt", "UTF-8", "15")
    (tmp_path / "empty.txt").write_text(" \n\n ")
    assert_refused(tmp_path / "empty.txt", "empty.txt", "no text")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": ')
    assert_refused(tmp_path / "broken.jsonl", "broken.jsonl")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    assert_refused(tmp_path / "broken.parquet", "broken.parquet")
    (tmp_path / "numbers.jsonl").write_text('{"text": 5}')
    assert_refused(tmp_path / "numbers.jsonl", "'text'", "int")
    assert_refused("stdlib:tests", "stdlib:topics", "stdlib:docstrings")
    for spec in ("hub:", "hub:a/b", "hub:a/b:c:train", "hub:a/b:c:train:text:x", "hub::c:train:text"):
        assert_refused(spec, "hub:REPO:CONFIG:SPLIT:COLUMN")


SCRIPT = """
import sys
from pilon_compress.errors import BadInput
from pilon_compress.data.text import open_text
for spec, part in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        documents = list(open_text(spec, part))
        print(len(documents), documents[0].splitlines()[0])
    except BadInput as error:
        print("refused:", error)
"""


def test_hub_datasets(hub):
    folder = hub.root / "datasets" / "some" / "prose"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl")
    card = "configs:\n- config_name: small\n  data_files:\n  - split: train\n    path: train.jsonl\n"
    (folder / "README.md").write_text(f"---\n{card}---\n")
    (hub.root / "datasets" / "some" / "script").mkdir()
    (hub.root / "datasets" / "some" / "script" / "script.py").write_text("raise SystemExit('must not run')")
    asked = {
        "hub:some/prose:small:train:text": "all",
        "hub:some/prose::train:text": "calibration",
        "hub:some/prose:small:train:body": "all",
        "hub:some/prose:small:test:text": "all",
        "hub:some/prose:large:train:text": "all",
        "hub:some/thing::train:text": "all",
        "hub:some/script::train:text": "all",
    }
    arguments = [word for item in asked.items() for word in item]
    lines = hub.run("-c", SCRIPT, *arguments).stdout.splitlines()
    assert lines[:2] == ["40 Document 0: naïve café.", "35 Document 0: naïve café."]
    expected = (
        ["'body'", "id, text"],
        ["test", "train"],
        ["large", "small"],
        ["some/thing", "stdlib"],
        ["some/script"],
    )
    for line, words in zip(lines[2:], expected, strict=True):
        assert line.startswith("refused:") and all(word in line for word in words), line
