"""Text files as people have them: lines, paragraphs, long lines, rows without text, names in any case."""

import csv
import json
import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pilon_compress.data import columns, plain, text
from pilon_compress.data.readers import json_lines, json_values
from pilon_compress.data.readers.registry import FORMATS, SOURCES, source, table_format
from pilon_compress.errors import BadInput

LINES = [f"Line {i}: naïve café." for i in range(40)]


def read(spec, part="all"):
    return list(text.open_text(str(spec), part))


def refusal(spec, read=read):
    with pytest.raises(BadInput) as error:
        read(spec)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_rows(path, table):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, table)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(table))
    else:
        pq.write_table(pa.Table.from_pylist(table), path)
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_without_blank_lines_every_line_is_a_document(tmp_path, end):
    path = tmp_path / "t.txt"
    path.write_bytes((end * 2 + end.join(LINES) + end * 3).encode())
    assert read(path) == LINES, "blank lines before and behind the text separate nothing"
    path.write_bytes(f"one{end}more{end} \t{end}two{end}".encode())
    assert read(path) == ["one\nmore", "two"]


def test_paragraphs_are_told_from_lines_by_the_beginning_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr(plain, "HEAD", 300)
    path = tmp_path / "t.txt"
    path.write_text("\n".join(LINES) + "\n\nlate\n")
    assert read(path) == [*LINES, "late"]
    path.write_text("\n\n" + "\n".join(LINES[:3]) + "\n\n" + "\n".join(LINES[3:]))
    assert read(path) == ["\n".join(LINES[:3]), "\n".join(LINES[3:])]


def test_a_line_of_any_length_is_read_in_pieces_and_bounded_memory(tmp_path, said):
    path = tmp_path / "t.txt"
    words = [f"word{i}" for i in range(100_000)]
    with path.open("w") as file:
        for _ in range(24):
            file.write(" ".join(words) + " ")
        file.write("\nlast line")
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    sizes, ends = [], set()
    for document in text.open_text(str(path)):
        sizes.append(len(document))
        ends.add(document[-1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) == path.stat().st_size - 1 and max(sizes) <= plain.LONGEST
    assert sizes[-1] == len("last line") and ends == {" ", "e"}
    assert peak < 16e6 + 4 * plain.HEAD
    (line,) = said()
    assert "t.txt" in line


def test_text_is_cut_at_the_best_boundary_and_nothing_is_lost():
    prose = "A first paragraph. It has two sentences.\n\nA second one\nof two lines. " * 30
    pieces = list(plain.cut(prose, 100))
    assert "".join(pieces) == prose and max(map(len, pieces)) <= 100
    assert sum(piece.endswith("\n\n") for piece in pieces) > len(pieces) // 3
    assert all(piece.endswith((" ", "\n")) for piece in pieces)
    assert list(plain.cut("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_long_texts_of_rows_are_cut_too(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(plain, "LONGEST", 100)
    path = write_rows(tmp_path / f"t.{suffix}", [{"text": "seven words and a blank behind it " * 9}, {"text": "short"}])
    *pieces, short = read(path)
    assert len(pieces) > 2 and all(len(piece) <= 100 for piece in pieces) and short == "short"


def test_suffixes_count_in_any_case(tmp_path):
    table = [{"text": line} for line in LINES]
    for name in ("a.TXT", "b.Txt"):
        (tmp_path / name).write_text("\n".join(LINES))
        assert read(tmp_path / name) == LINES
    for suffix in ("jsonl", "json", "parquet"):
        path = write_rows(tmp_path / f"t.{suffix}", table)
        assert read(path.rename(tmp_path / f"T.{suffix.upper()}")) == LINES
    assert len(list(text.open_rows(str(tmp_path / "T.JSONL")))) == 40


def test_home_folder_and_names_with_brackets(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a[0].txt", "b*.txt", "c?.txt", "d [final] (1).txt"):
        (tmp_path / name).write_text(f"{name}\nmore")
        assert read(tmp_path / name)[0] == name == read(f"~/{name}")[0]
        assert name in text.fingerprint(f"~/{name}")
    (tmp_path / "b2.txt").write_text("two")
    assert read(tmp_path / "b*.txt") == ["b*.txt", "more"], "a file of that name is meant"
    assert len(read("~/[bc]*.txt")) == 5
    path = write_rows(tmp_path / "e[1].jsonl", [{"body": "in a column"}])
    assert read(f"{path}::body") == ["in a column"]


def test_a_folder_stands_for_its_text_files(tmp_path, said):
    assert "folder" in refusal(tmp_path)
    (tmp_path / "b.txt").write_text("two\nthree")
    write_rows(tmp_path / "a.jsonl", [{"text": "one"}])
    (tmp_path / ".hidden").write_text("no")
    assert read(tmp_path) == ["one", "two", "three"] and said() == []
    (tmp_path / "notes.md").write_text("no")
    assert read(f"{tmp_path}/") == ["one", "two", "three"]
    assert "1 of 3 files are left out (.md)" in said()[0]


@pytest.mark.parametrize(
    ("name", "advice"),
    [("t.md", ".txt"), ("t.csv", "parquet"), ("t.txt.gz", "unpack"), ("t.TSV", "parquet"), ("t", ".txt"), ("t.x", "")],
)
def test_another_format_is_refused_with_advice(tmp_path, name, advice):
    (tmp_path / name).write_text("text")
    message = refusal(tmp_path / name)
    assert name in message and advice in message.rpartition(";")[2]


def test_names_that_no_file_can_have_are_refused(tmp_path):
    for name in ("x" * 5000, "a\0b.txt", "[", "", "Some text instead of a name."):
        assert "no " in refusal(name)
    os.mkfifo(tmp_path / "pipe.txt")
    assert "no such file" in refusal(tmp_path / "pipe.txt")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_rows_without_text_are_skipped_and_counted(tmp_path, said, suffix):
    table = [{"id": 0, "text": None}, {"id": 1}, {"id": 2, "text": "two"}, {"id": 3, "text": " \n"}, {"text": "four"}]
    path = write_rows(tmp_path / f"t.{suffix}", table)
    assert read(path) == ["two", "four"] == read(path)
    assert said() == [f"{path}: 3 of 5 rows hold no text in column 'text' and were skipped"]
    assert "id, text" in refusal(f"{path}::body")
    wrong = write_rows(tmp_path / f"w.{suffix}", [{"text": None}, {"text": [1]}])
    assert "row 2" in refusal(wrong) and "list" in refusal(wrong)
    empty = write_rows(tmp_path / f"e.{suffix}", [{"text": None}, {"text": ""}])
    assert "'text'" in refusal(empty) and "2 rows" in refusal(empty)
    assert said() == []


def test_reading_that_ends_early_counts_what_was_read(tmp_path, said):
    path = write_rows(tmp_path / "t.jsonl", [{"text": ""}, *({"text": line} for line in LINES)])
    documents = text.open_text(str(path))
    assert next(documents) == LINES[0]
    documents.close()
    assert "1 of 2 rows" in said()[0]


def test_a_column_that_is_missing_is_noticed_before_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "ROWS_WITHOUT_COLUMN", 10)
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(['{"a": 1, "b": 2}'] * 20 + ["not json"]))
    assert "a, b" in refusal(path)


@pytest.mark.parametrize(
    ("suffix", "content", "words"),
    [
        ("jsonl", '{"text": "a"}\n5', "row 2, must be an object, not int"),
        ("jsonl", '{"text": "a"}\n[1]', "row 2, must be an object, not list"),
        ("jsonl", '{"text": "a"}\n\n{"text": ', "line 3, is not JSON"),
        ("jsonl", "[" * 200_000, "line 1, is nested too deeply"),
        ("jsonl", '{"text": ' + "9" * 5000 + "}", "line 1"),
        ("jsonl", b'{"text": "caf\xe9"}', "line 1, is not JSON"),
        ("json", '[{"text": "a"}, 5]', "row 2, must be an object, not int"),
        ("json", '[{"text": "a"}, {"text": "b"}', "ends within the array"),
        ("json", '[{"text": "a"} {"text": "b"}]', "a comma is missing"),
        ("json", '[{"text": "a"},]', "a value is missing"),
        ("json", '[{"text": "a"}, {"text": b}]', "row 2, is not JSON"),
        ("json", '[{"text": "a"}, ' + "[" * 200_000, "row 2, is nested too deeply"),
        ("json", b'[{"text": "caf\xe9"}]', "row 1, cannot be read"),
        ("parquet", b"PAR1", "cannot be read"),
    ],
)
def test_broken_rows_are_refused_in_one_line_with_their_number(tmp_path, said, suffix, content, words):
    path = tmp_path / f"t.{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert f"{path}" in refusal(path) and words in refusal(path)
    assert said() == []


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_row_longer_than_the_limit_is_refused(tmp_path, monkeypatch, suffix):
    for reader in (json_lines, json_values):
        monkeypatch.setattr(reader, "LONGEST_ROW", 2**20)
    path = write_rows(tmp_path / f"t.{suffix}", [{"text": "fine"}, {"text": "x" * (3 << 20)}])
    message = refusal(path)
    assert "line 2" in message or "row 2" in message


def test_json_of_all_shapes_gives_the_same_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(json_values, "CHUNK", 7)  # every value straddles a chunk
    path = tmp_path / "t.json"
    objects = [{"id": i, "text": line} for i, line in enumerate(LINES)]
    columns = {"id": list(range(40)), "text": LINES}
    by_index = {name: {str(i): value for i, value in enumerate(values)} for name, values in columns.items()}
    for content in (
        json.dumps(objects, indent=1),
        "\ufeff" + json.dumps(objects),
        "\n".join(map(json.dumps, objects)),
        json.dumps(columns),
        json.dumps(by_index),
        json.dumps(LINES),
    ):
        path.write_text(content, "utf-8")
        assert read(path) == LINES
    path.write_text('{"text": "the only row"}')
    assert read(path) == ["the only row"]
    for content in ("", "[]", " "):
        path.write_text(content)
        assert "no text" in refusal(path)


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    (tmp_path / "t.jsonl").write_text(r'{"text": "half \ud83d of one"}' + "\n" + r'{"text": "\ud83d\ude00"}')
    assert read(tmp_path / "t.jsonl") == ["half \ufffd of one", "😀"]


def test_parquet_reads_the_column_that_is_asked_for(tmp_path):
    columns = {
        "text": pa.array(LINES).dictionary_encode(),
        "large": pa.array(LINES, pa.large_string()),
        "raw": pa.array([b"x"] * 40),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet") == LINES == read(f"{tmp_path}/t.parquet::large")
    assert "bytes" in refusal(f"{tmp_path}/t.parquet::raw")


@pytest.fixture
def registries(monkeypatch):
    """Remove readers that a test registered."""
    for registry in (SOURCES, FORMATS):
        monkeypatch.setattr(registry, "_entries", dict(registry))


def test_a_format_of_files_is_one_registration(tmp_path, registries):
    @table_format(".csv", about="Comma-separated values, as spreadsheets write them.")
    def rows(path, column):
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)

    (tmp_path / "t.csv").write_text('id,body\n1,"one, two"\n2,\n3,three\n')
    (tmp_path / "t.txt").write_text("four")
    assert read(f"{tmp_path / 't.csv'}::body") == ["one, two", "three"]
    assert [row for _, row in text.open_rows(str(tmp_path / "t.csv"))][0] == {"id": "1", "body": "one, two"}
    assert ".csv" in refusal(tmp_path / "absent.jsonl") and ".csv" in refusal(tmp_path / "t.csv")
    with pytest.raises(BadInput, match="there is a file format '.csv' already"):
        table_format(".csv", about="")(rows)


def test_a_scheme_is_one_registration(registries):
    @source("count", form="count:NUMBER", about="Numbers in words.", fingerprint=lambda spec: spec)
    def documents(spec):
        yield from (f"number {place}" for place in range(int(spec.partition(":")[2])))

    assert read("count:3") == ["number 0", "number 1", "number 2"]
    assert text.fingerprint("count:3") == "count:3"
    assert "count:NUMBER" in refusal("nothing/of/that/name.txt")
    assert "without columns" in refusal("count:3", lambda spec: list(text.open_rows(spec)))


def test_what_is_no_source_is_told_all_that_there_are():
    message = refusal("absent.txt")
    assert all(one.form in message for one in SOURCES.values()) and all(suffix in message for suffix in FORMATS)
    assert "write stdin alone" in refusal("stdin:x")
