"""Token files: every document once and whole, made again exactly when they must be, never half."""

import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pilon_compress.data import sequences
from pilon_compress.data.token_files import tokenise
from pilon_compress.errors import BadInput

DOCUMENTS = [f"Document {i}: naïve café.\n" + "More of it. " * (i % 7) for i in range(60)]
EOS = 2


@pytest.fixture
def tokenizer(tiny):
    return tiny.tiny_tokenizer()


@pytest.fixture
def source(tmp_path):
    return str(write(tmp_path / "text.jsonl", DOCUMENTS))


def write(path: Path, documents: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents), "utf-8")
    return path


def documents_of(file, tokenizer):
    pieces = np.split(np.asarray(file.ids), file.starts[1:])
    assert all(piece[-1] == EOS for piece in pieces)
    return [tokenizer.decode(piece[:-1]) for piece in pieces]


def with_bos(tokenizer, bos="<bos>", index=1):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, index)])
    tokenizer.bos_token = bos
    return tokenizer


def words_tokenizer(count):
    """`count` entries: <eos>, then w1, w2, ..."""
    core = Tokenizer(models.WordLevel({"<eos>": 0, **{f"w{i}": i for i in range(1, count)}}, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def test_every_document_is_there_whole_with_eos_at_its_end(source, tokenizer, tmp_path):
    file = tokenise(source, tokenizer, "all", tmp_path / "cache")
    assert documents_of(file, tokenizer) == DOCUMENTS
    assert file.ids.dtype == np.uint16 and file.starts.dtype == np.int64
    assert len(file) == file.about.tokens and file.about.documents == 60
    assert file.about.utf8_bytes == sum(len(document.encode()) for document in DOCUMENTS)
    assert file.about.largest == file.ids.max()


def test_batches_of_the_tokenizer_do_not_show(source, tokenizer, tmp_path, monkeypatch):
    whole = tokenise(source, tokenizer, "all", tmp_path / "a")
    monkeypatch.setattr(sequences, "DOCUMENTS", 7)
    monkeypatch.setattr(sequences, "CHARACTERS", 100)
    pieces = tokenise(source, tokenizer, "all", tmp_path / "b")
    assert np.array_equal(whole.ids, pieces.ids) and np.array_equal(whole.starts, pieces.starts)


def test_train_and_validation_share_no_document(source, tokenizer, tmp_path):
    train, validation = (
        documents_of(tokenise(source, tokenizer, part, tmp_path), tokenizer) for part in ("train", "validation")
    )
    assert validation and not set(train) & set(validation)
    assert sorted(train + validation) == sorted(DOCUMENTS)


def test_bos_and_eos_are_never_doubled(tiny, tmp_path):
    path = write(tmp_path / "t.jsonl", ["plain", "<bos>has one", "has one<eos>", "<bos>has both<eos>"])
    expected = {"plain": [1, *b"plain", 2], "has one": [1, *b"has one", 2], "has both": [1, *b"has both", 2]}
    tokenizer = with_bos(tiny.tiny_tokenizer())
    file = tokenise(str(path), tokenizer, "all", tmp_path)
    pieces = [piece.tolist() for piece in np.split(np.asarray(file.ids), file.starts[1:])]
    assert [len(piece) for piece in pieces] == [
        len(expected[key]) for key in ("plain", "has one", "has one", "has both")
    ]
    assert all(piece[0] == 1 and piece[-1] == 2 and {1, 2}.isdisjoint(piece[1:-1]) for piece in pieces)
    without = tokenise(str(path), tiny.tiny_tokenizer(), "all", tmp_path)
    assert without.folder != file.folder and without.ids[0] != 1, "a tokenizer that puts no BOS gets none"
    same = tokenise(str(path), with_bos(tiny.tiny_tokenizer(), "<eos>", 2), "all", tmp_path)
    assert same.ids[0] != 2 and (np.diff(np.flatnonzero(same.ids == 2)) > 1).all(), "BOS is EOS"


@pytest.mark.parametrize(("count", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_large_vocabularies_take_four_bytes(tmp_path, count, dtype):
    path = write(tmp_path / "t.jsonl", [f"w5 w{count - 1} w7", "w9"])
    file = tokenise(str(path), words_tokenizer(count), "all", tmp_path)
    assert file.ids.dtype == dtype and file.ids.tolist() == [5, count - 1, 7, 0, 9, 0]
    assert file.about.largest == count - 1


def test_files_are_reused_until_source_or_tokenizer_change(source, tiny, tokenizer, tmp_path):
    def stamp(file):
        return {path.name: path.stat().st_mtime_ns for path in file.folder.iterdir()}

    first = tokenise(source, tokenizer, "all", tmp_path / "cache")
    before = stamp(first)
    tokenizer(["some", "texts"], padding=True, truncation=True, max_length=3)  # leaves a mark in the tokenizer
    for same in (tokenizer, tiny.tiny_tokenizer()):
        again = tokenise(source, same, "all", tmp_path / "cache")
        assert again.folder == first.folder and stamp(again) == before

    write(Path(source), [*DOCUMENTS, "One more."])
    changed = tokenise(source, tokenizer, "all", tmp_path / "cache")
    assert documents_of(changed, tokenizer) == [*DOCUMENTS, "One more."]
    other = tokenise(source, with_bos(tiny.tiny_tokenizer()), "all", tmp_path / "cache")
    assert len(other) == len(changed) + 61


@pytest.mark.parametrize("name", ["tokens.bin", "starts.bin", "about.json"])
def test_files_that_are_not_whole_are_made_again(source, tokenizer, tmp_path, name):
    file = tokenise(source, tokenizer, "all", tmp_path / "cache")
    os.truncate(file.folder / name, (file.folder / name).stat().st_size // 2)
    again = tokenise(source, tokenizer, "all", tmp_path / "cache")
    assert documents_of(again, tokenizer) == DOCUMENTS
    (again.folder / name).unlink()
    assert documents_of(tokenise(source, tokenizer, "all", tmp_path / "cache"), tokenizer) == DOCUMENTS


def test_what_a_killed_process_left_is_cleared(source, tokenizer, tmp_path):
    file = tokenise(source, tokenizer, "all", tmp_path / "cache")
    left = file.folder.with_name(f".{file.folder.name}.part")
    file.folder.rename(left)
    (left / "tokens.bin").write_bytes(b"half")
    assert documents_of(tokenise(source, tokenizer, "all", tmp_path / "cache"), tokenizer) == DOCUMENTS
    assert not left.exists()


def test_the_cache_folder_can_be_named(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("PILON_CACHE", str(tmp_path / "here"))
    assert tokenise(source, tokenizer, "all").folder.parent == tmp_path / "here"
    monkeypatch.delenv("PILON_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tokenise(source, tokenizer, "all").folder.parent == tmp_path / ".cache/pilon-compress/tokens"


def fill(source, folder, tokenizer, said):
    """Limit files to 1000 bytes in a process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        tokenise(source, tokenizer, "all", folder)
    except BadInput as error:
        said.send(str(error))


def test_a_full_disk_is_one_line_and_leaves_nothing(source, tokenizer, tmp_path):
    context = multiprocessing.get_context("fork")
    heard, said = context.Pipe(duplex=False)
    process = context.Process(target=fill, args=(source, tmp_path / "cache", tokenizer, said))
    process.start()
    process.join()
    assert heard.poll(), "it was refused"
    message = heard.recv()
    assert "\n" not in message and "file too large" in message
    assert str(tmp_path / "cache") in message and "PILON_CACHE" in message
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_an_unwritable_cache_is_one_line(source, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write .*file.*: Not a directory; set PILON_CACHE"):
        tokenise(source, tokenizer, "all", tmp_path / "file" / "cache")


def test_an_interrupted_build_leaves_nothing(source, tokenizer, tmp_path, monkeypatch):
    def stopped(*arguments):
        yield DOCUMENTS[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(sequences, "CHARACTERS", 1)
    monkeypatch.setattr("pilon_compress.data.text.open_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        tokenise(source, tokenizer, "all", tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def build(source, folder, tokenizer, together):
    together.wait()
    file = tokenise(source, tokenizer, "all", folder)
    assert documents_of(file, tokenizer) == DOCUMENTS


def test_processes_that_build_at_once_all_end_with_the_file(source, tokenizer, tmp_path):
    context = multiprocessing.get_context("fork")
    together = context.Barrier(3)
    work = [context.Process(target=build, args=(source, tmp_path / "cache", tokenizer, together)) for _ in range(3)]
    for process in work:
        process.start()
    for process in work:
        process.join()
    assert [process.exitcode for process in work] == [0, 0, 0]
    assert len([path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]) == 1


def test_what_cannot_be_tokenised_is_said_in_one_line(tiny, source, tokenizer, tmp_path):
    with pytest.raises(BadInput, match="eos_token"):
        tokenise(source, tiny.tiny_tokenizer(eos=False), "all", tmp_path)
    with pytest.raises(BadInput, match="nowhere.txt"):
        tokenise(str(tmp_path / "nowhere.txt"), tokenizer, "all", tmp_path)
    with pytest.raises(BadInput, match="none of which falls to the held-out part"):
        tokenise(str(write(tmp_path / "one.jsonl", [DOCUMENTS[0]])), tokenizer, "validation", tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_sources_are_told_apart(tmp_path, tokenizer):
    from pilon_compress.data.text import fingerprint

    a, b = (write(tmp_path / name, DOCUMENTS[:3]) for name in ("a.jsonl", "b.jsonl"))
    assert fingerprint(str(a)) != fingerprint(str(b)) != fingerprint(str(tmp_path / "*.jsonl"))
    before = fingerprint(f"{a}::text")
    os.utime(a, ns=(1, 1))
    assert fingerprint(f"{a}::text") != before
    assert sys.version in fingerprint("stdlib:topics")
