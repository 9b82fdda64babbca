"""Data that is read while it is trained on: in its order, from any place on, and no further than it must be."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from runs import TORCHRUN, configure, losses, metrics, train

from deepfast.train import data, documents, stream

PROSE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8") + "\n\n  ümläut\r\nand\n\n\n\tmore\n" * 50


@pytest.fixture
def source(tmp_path) -> Path:
    """Documents of all kinds."""
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text(PROSE, newline="")
    rows = [{"text": f"row {i}\n{PROSE[i : i + i % 90]}"} for i in range(300)]
    (folder / "b.jsonl").write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    column = [None if i % 7 == 0 else f"line {i}: {PROSE[5 * i : 5 * i + i]}" for i in range(200)]
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), folder / "deep" / "c.parquet", row_group_size=64)
    (folder / "deep" / "d.txt").write_bytes(b"\xff\xfe")
    (folder / "deep" / "e.md").touch()
    (folder / "z.py").write_text("print('the end')\n")
    return folder


@pytest.fixture
def tokenizer(source):
    return data.train_tokenizer(documents.source_files(str(source))[1], 400, first=True)


def reader(source: Path, tokenizer, vocab_size: int = 400) -> stream.Reader:
    return stream.Reader(str(source), tokenizer, vocab_size, None if tokenizer is None else 0)


def all_tokens(source: Path, tokenizer, output: Path, vocab_size: int = 400) -> np.ndarray:
    _, files = documents.source_files(str(source))
    data.prepare(str(source), files, output, tokenizer, vocab_size, None if tokenizer is None else 0)
    return np.fromfile(output / "tokens.bin", dtype=np.uint16).astype(np.int64)


@pytest.mark.parametrize("block", [200, 1000, 1 << 20])
def test_it_is_what_would_be_tokenized_before_in_its_order_over_and_over(
    source, tokenizer, tmp_path, monkeypatch, caplog, block
):
    """However long the pieces are in which it is read."""
    monkeypatch.setattr(stream, "_BLOCK", block)
    caplog.set_level(logging.INFO, "deepfast")
    whole = all_tokens(source, tokenizer, tmp_path / "out")
    found = reader(source, tokenizer)
    assert found.head.tolist() == whole[: data.HEAD].tolist()
    taken = np.concatenate([found.take(97) for _ in range(2 * len(whole) // 97 + 5)])
    assert taken.tolist() == np.tile(whole, 3)[: len(taken)].tolist()
    assert caplog.text.count("is at its end and begins anew") == 1
    caplog.clear()
    found.close()
    assert caplog.text.count("skipped: 1 of the files: no UTF-8 text; 1 of the lines") == 1, "not once for each epoch"


def test_it_goes_on_from_any_place(source, tokenizer, monkeypatch):
    monkeypatch.setattr(stream, "_BLOCK", 500)
    found, places, parts = reader(source, tokenizer), [], []
    sizes = np.random.default_rng(3).integers(1, 1400, 80)
    for size in sizes:
        places.append(json.loads(json.dumps(found.place.__dict__)))
        parts.append(found.take(size))
    assert len({place["file"] for place in places}) == 4
    assert max(place["epoch"] for place in places) > 0
    again = reader(source, tokenizer)
    for i in range(0, 80, 7):
        assert again.seek(stream.Place(**places[i]))
        assert again.place == stream.Place(**places[i])
        for j in range(i, min(i + 3, 80)):
            assert again.take(sizes[j]).tolist() == parts[j].tolist()


def test_another_dataset_is_begun_anew(source, tokenizer):
    found = reader(source, tokenizer)
    first = found.take(5000)
    place = found.place
    assert not found.seek(stream.Place("elsewhere", place.file, place.at))
    assert found.take(5000).tolist() == first.tolist()
    (source / place.file).rename(source / "another.txt")
    assert not reader(source, tokenizer).seek(place)


def test_nothing_is_read_that_is_not_wanted(source, tokenizer, monkeypatch):
    read = []

    def spied(path, *how):
        for piece in documents.pieces(path, *how):
            read.append(path.name)
            yield piece

    monkeypatch.setattr(stream, "pieces", spied)
    monkeypatch.setattr(stream, "_CHUNK", 1000)
    monkeypatch.setattr(stream, "_BLOCK", 1000)
    found = reader(source, tokenizer)
    for _ in range(5):
        found.take(50)
    for chunk in found._coming:
        chunk.result()
    assert 0 < len(read) < 12
    assert set(read) == {"a.txt"}
    # A chunk does not go beyond the end of little data.
    found.close()
    for path in (source / "a.txt", source / "b.jsonl"):
        path.unlink()
    shutil.rmtree(source / "deep")
    read.clear()
    found = reader(source, tokenizer)
    found.take(1)
    for chunk in found._coming:
        chunk.result()
    assert len(read) < 40


def test_a_place_in_a_file_is_found_without_reading_what_comes_before(source, monkeypatch):
    """Rows of .parquet by their group, the others by the byte."""
    rows = []
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "iter_batches",
        lambda self, *a, _iter=pyarrow.parquet.ParquetFile.iter_batches, **k: rows.append(k) or _iter(self, *a, **k),
    )
    skipped = documents.Skipped()
    path = source / "deep" / "c.parquet"
    every = list(documents.pieces(path, skipped))
    rows.clear()
    assert list(documents.pieces(path, skipped, every[-3].at)) == every[-3:]
    assert [k["row_groups"] for k in rows] == [[3]]
    lines = list(documents.pieces(source / "b.jsonl", documents.Skipped()))
    assert list(documents.pieces(source / "b.jsonl", skipped, lines[200].at)) == lines[200:]
    assert skipped == documents.Skipped(0, 1)


@pytest.mark.parametrize(
    "text",
    ["one line without an end " * 99, "äöü€𝄞" * 99, "\n".join(" indented" for _ in range(99)), "a\r\nb\r\r\n" * 99,
     "\n" * 300, "\r" * 300, "word\n\n" * 99],
)  # fmt: skip
def test_a_text_in_pieces_is_the_text(tmp_path, text):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    whole = path.read_text(encoding="utf-8")
    for block in (16, 61, 64):
        found = list(documents.pieces(path, documents.Skipped(), 0, block))
        assert "".join(piece.text for piece in found) == whole
        assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True]
        assert len(found) >= len(text.encode()) // block


def test_a_large_text_is_never_in_memory_whole(tmp_path, tokenizer, monkeypatch):
    """Nor where all of the data is tokenized before; and its tokens are the same."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "a.txt").write_text(PROSE)
    expected = all_tokens(folder, tokenizer, tmp_path / "whole")
    read = []
    original = documents._blocks
    monkeypatch.setattr(documents, "_blocks", lambda path, at, _: read.append(path) or original(path, at, 300))
    assert all_tokens(folder, tokenizer, tmp_path / "parts").tolist() == expected.tolist()
    assert read


def test_token_files_are_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_BLOCK", 30)
    (tmp_path / "data").mkdir()
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "data" / "a.bin")
    np.arange(100, 140, dtype=np.uint16).tofile(tmp_path / "data" / "b.bin")
    found = reader(tmp_path / "data", None)
    assert found.take(45).tolist() == list(range(45))
    place = found.place
    rest = found.take(200).tolist()
    assert rest == [*range(45, 140), *range(105)]
    assert found.seek(place)
    assert found.take(200).tolist() == rest
    with pytest.raises(data.DataError, match=r"a\.bin: holds the token 29, but the model knows only 20"):
        reader(tmp_path / "data", None, 20).take(40)
    (tmp_path / "data" / "c.bin").write_bytes(b"odd")
    with pytest.raises(data.DataError, match="3 bytes are not a whole number of uint16"):
        reader(tmp_path / "data", None)


def test_data_without_text_is_refused_and_not_read_for_ever(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").touch()
    (tmp_path / "empty" / "b.txt").write_bytes(b"\xff")
    with pytest.raises(data.DataError, match="no readable text in its 2 files"):
        reader(tmp_path / "empty", tokenizer)


def test_a_tokenizer_is_trained_on_the_beginning(source, monkeypatch):
    monkeypatch.setattr(data, "SAMPLE", 300)
    read = []
    original = data.pieces
    monkeypatch.setattr(data, "pieces", lambda path, *how: read.append(path.name) or original(path, *how))
    _, files = documents.source_files(str(source))
    tokenizer = data.train_tokenizer(files, 300, first=True)
    assert read == ["a.txt"]
    assert tokenizer.get_vocab_size() <= 300


def test_training_on_a_stream(place):
    """Resumed in the middle of a document, past the data's end, on one rank and on two: the very same losses."""
    shape = json.loads((place / "tiny" / "config.json").read_text())
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    (place / "tiny" / "config.json").write_text(json.dumps({**shape, **off}))
    shutil.rmtree(place / "text")
    (place / "text").mkdir()
    (place / "text" / "a.jsonl").write_text("".join(json.dumps({"text": PROSE[:n]}) + "\n" for n in (200, 500, 800)))
    (place / "text" / "b.txt").write_text(PROSE[4000:4400])
    common = {"streaming": True, "num_train_steps": 30, "save_steps": 10, "gradient_accumulation_steps": 2}
    configure(place, **common)
    done = train(place)
    assert done.returncode == 0, done.stderr
    assert "training a byte-level BPE of 320 tokens on the first 32 MiB of text" in done.stdout
    assert "streaming: text is at its end and begins anew" in done.stdout
    assert not (place / "output" / "data").exists(), "nothing is kept"
    whole = [(row["loss"], row["grad_norm"]) for row in metrics(place)]
    assert len(set(whole)) == 30
    done = train(place, "--resume", "step20", launch=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert "written by 1 rank(s), read by 2" in done.stdout
    assert "begins anew" in done.stdout
    assert "where the data stood is not known" not in done.stdout
    assert [(row["loss"], row["grad_norm"]) for row in metrics(place)] == whole
    # What it has trained on, in order.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "output" / "model")
    tokens = all_tokens(place / "text", tokenizer.backend_tokenizer, place / "whole", 320)
    assert len(tokens) < 30 * 4 * 32 / 2
    # All of it before: another order, and the run says so.
    done = train(place, "--resume", "--set", "streaming=false", "--set", "num_train_steps=31")
    assert done.returncode == 0, done.stderr
    assert "streaming is now False, it was True: the data goes on in another order" in done.stdout
    assert len(losses(place)) == 31
