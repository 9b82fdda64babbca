"""Datasets: what is read, what is skipped, in which order it is dealt out."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch

from deepfast.errors import UserError
from deepfast.train import data, gpt2

TEXT = "".join(f"line {i}: the quick brown fox jumps over the lazy dog\n" for i in range(300))


def prepared(tmp_path: Path, source: Path, vocab_size: int = 300):
    _, files = data.source_files(str(source))
    tokenizer = data.train_tokenizer(files, vocab_size)
    end = tokenizer.token_to_id(data.END_OF_TEXT)
    folder = data.prepare(str(source), files, tmp_path / "out", tokenizer, vocab_size, end)
    return folder, tokenizer


def tokens_of(source: Path, tmp_path: Path, vocab_size: int) -> Path:
    _, files = data.source_files(str(source))
    return data.prepare(str(source), files, tmp_path / "out", None, vocab_size, None)


def read_back(tmp_path: Path, source: Path) -> list[str]:
    """The documents as the tokens tell them."""
    folder, tokenizer = prepared(tmp_path, source)
    tokens = np.fromfile(folder / "tokens.bin", dtype=np.uint16)
    ends = np.flatnonzero(tokens == tokenizer.token_to_id(data.END_OF_TEXT))
    return [
        tokenizer.decode(part[part != 0].tolist(), skip_special_tokens=False)
        for part in np.split(tokens, ends + 1)[:-1]
    ]


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "data"
    (folder / "deep" / "er").mkdir(parents=True)
    return folder


def test_every_kind_of_file(tmp_path, source):
    (source / "a.txt").write_text(TEXT)
    (source / "b.md").write_text("# ümläut\r\n")
    (source / "deep" / "c.py").write_text("print('π')\n")
    (source / "deep" / "er" / "d.jsonl").write_text('{"text": "one", "n": 1}\n{"text": "two"}\n"three"\n\n')
    rows = pyarrow.table({"n": [1, 2, 3], "text": ["four", None, "five"]})
    pyarrow.parquet.write_table(rows, source / "e.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["six"]}), source / "f.parquet")
    categories = pyarrow.array(["seven"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": categories}), source / "g.parquet")
    (source / "h.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "eight"}\n')  # a byte order mark
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "i.txt").write_text("nine")
    (source / "link").symlink_to(tmp_path / "elsewhere")
    (source / "link" / "circle").symlink_to(source)
    (source / "ignored.csv").write_text("no")
    expected = [TEXT, "# ümläut\n", "print('π')\n", "one", "two", "three", "four", "five", "six", "seven", "eight",
                "nine"]  # fmt: skip
    assert read_back(tmp_path, source) == expected


def test_what_cannot_be_read_is_skipped_and_counted(tmp_path, source, caplog):
    caplog.set_level(logging.INFO, "deepfast")
    (source / "a.txt").write_text(TEXT)
    (source / "latin1.txt").write_bytes("Größe".encode("latin-1"))
    (source / "junk.py").write_bytes(bytes(range(256)))
    (source / "broken.parquet").write_bytes(b"PAR1 not really")
    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), source / "numbers.parquet")
    lines = ['{"text": "good"}', '{"text": 3}', "{broken", '"\\ud800"', "[" * 100_000, "9" * 5000]
    (source / "bad.jsonl").write_text("\n".join(lines) + "\n")
    (source / "empty.txt").touch()
    assert read_back(tmp_path, source) == [TEXT, "good"]
    assert 'skipped: 4 of the files: no UTF-8 text; 5 of the lines: no "text" in them' in caplog.text


def test_token_files(tmp_path, source):
    plain, headed = np.arange(100, dtype=np.uint16), np.arange(100, 150, dtype=np.uint16)
    plain.tofile(source / "a.bin")
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, 50
    with (source / "b.bin").open("wb") as file:
        header.tofile(file)
        headed.tofile(file)
    folder = tokens_of(source, tmp_path, 150)
    assert np.fromfile(folder / "tokens.bin", dtype=np.uint16).tolist() == list(range(150))
    with pytest.raises(data.DataError, match=r"a\.bin: holds the token 99, but the model knows only 99"):
        tokens_of(source, tmp_path, 99)
    (source / "c.bin").write_bytes(b"odd")
    with pytest.raises(data.DataError, match="3 bytes are not a whole number of uint16"):
        tokens_of(source, tmp_path, 150)


def test_llmc_headers_are_checked(tmp_path, source):
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240801, 7, 4
    header.tofile(source / "a.bin")
    with pytest.raises(data.DataError, match="0 bytes are not 4 tokens of uint32, as its header says"):
        tokens_of(source, tmp_path, 10)
    with (source / "a.bin").open("ab") as file:
        np.arange(4, dtype=np.uint32).tofile(file)
    (source / "README.md").write_text("about the tokens")
    assert np.fromfile(tokens_of(source, tmp_path, 10) / "tokens.bin", dtype=np.uint16).tolist() == [0, 1, 2, 3]


def test_tokens_are_known_to_be_whole(tmp_path, source):
    np.arange(100, dtype=np.uint16).tofile(source / "a.bin")
    folder = tokens_of(source, tmp_path, 100)
    assert data.complete(folder, str(source))
    assert not data.complete(folder, "other")
    (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-2])
    assert not data.complete(folder, str(source))
    assert not data.complete(tmp_path, str(source))


def test_large_vocabularies_need_four_bytes(tmp_path, source):
    (source / "a.txt").write_text(TEXT)
    _, files = data.source_files(str(source))
    tokenizer = data.train_tokenizer(files, 300)
    folder = data.prepare(str(source), files, tmp_path / "out", tokenizer, 100_000, 0)
    assert json.loads((folder / "tokens.json").read_text())["dtype"] == "uint32"
    assert data.Sequences(folder, 8, 0)[0].max() < 300


def test_the_standard_library_is_a_dataset():
    _, files = data.source_files("stdlib")
    assert sum(p.stat().st_size for p in files) > 4e6
    assert not [p for p in files if "site-packages" in p.parts]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d.rmdir(), "no such folder"),
        (lambda d: None, r"no \.txt \.md \.py \.jsonl \.parquet or \.bin file"),
        (lambda d: (d / "a.csv").write_text("x"), r"no \.txt"),
        (lambda d: (d / "a.txt").touch(), "no readable text in its 1 file"),
        (lambda d: (d / "a.txt").write_bytes(b"\xff\xfe\xff"), "no readable text in its 1 file"),
    ],
)
def test_useless_datasets_are_refused(tmp_path, make, message):
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    with pytest.raises(data.DataError, match=message):
        prepared(tmp_path, folder)


def test_each_epoch_sees_each_sequence_once_in_another_order(tmp_path, source):
    np.arange(107, dtype=np.uint16).tofile(source / "a.bin")
    folder = tokens_of(source, tmp_path, 107)
    sequences = data.Sequences(folder, 10, seed=3)
    assert sequences.count == 10
    epochs = [[int(sequences[e * 10 + i][0]) for i in range(10)] for e in range(3)]
    assert all(sorted(e) == list(range(0, 100, 10)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = data.Sequences(folder, 10, seed=3)
    assert torch.equal(again.batch(17, 9), sequences.batch(17, 9)), "a position is all there is to resume from"
    assert again.batch(17, 9).shape == (9, 10)
    assert [int(data.Sequences(folder, 10, seed=4)[i][0]) for i in range(10)] != epochs[0]
    with pytest.raises(data.DataError, match=r"107 tokens are shorter than one sequence \(train_sequence_length=108\)"):
        data.Sequences(folder, 108, 0)


def laid_down(folder: Path, count: int) -> Path:
    folder.mkdir()
    np.arange(count, dtype=np.uint32).tofile(folder / "tokens.bin")
    (folder / "tokens.json").write_text(json.dumps({"dataset_dir": "x", "tokens": count, "dtype": "uint32"}))
    return folder


@pytest.mark.parametrize(
    ("count", "share", "held", "runs"),
    [
        (10_000, 0.05, 500, 16),
        (1000, 0.1, 100, 12),
        (300, 0.01, 3, 1),
        (50, 0.001, 1, 1),
        (10, 0.9, 9, 1),
        (2, 0.5, 1, 1),
    ],
)
def test_a_share_is_held_out(tmp_path, count, share, held, runs):
    """Not trained on, always the same, in a few runs that are spread over the data."""
    folder = laid_down(tmp_path / "out", count * 10 + 7)
    sequences = data.Sequences(folder, 10, 0, share)
    assert sequences.count == count - held
    trained = sorted(int(sequences[i][0]) // 10 for i in range(sequences.count))
    chosen = sequences.held.chosen.tolist()
    assert sorted([*trained, *chosen]) == list(range(count))
    assert all((sequences[i] == np.arange(sequences[i][0], sequences[i][0] + 10)).all() for i in range(9))
    gaps = np.diff([-1, *chosen, count]) - 1
    assert np.count_nonzero(gaps[1:-1]) == runs - 1
    between = gaps[gaps > 0]
    assert between.max() <= max(2 * between.min() + 3, between.min() + 2), "evenly"
    assert data.Sequences(folder, 10, 5, share).held.chosen.tolist() == chosen, "whatever the seed"
    held_out = sequences.held
    assert held_out.batch(0, held).tolist() == [list(range(10 * i, 10 * i + 10)) for i in chosen]
    few = held_out.at_most(3)
    assert few.count == min(3, held)
    assert few.chosen[0] == chosen[0]
    assert set(few.chosen) <= set(chosen)
    # Another epoch has the same sequences.
    again = sorted(int(sequences[sequences.count + i][0]) // 10 for i in range(sequences.count))
    assert again == trained


def test_a_share_leaves_something(tmp_path):
    folder = laid_down(tmp_path / "out", 19)
    with pytest.raises(data.DataError, match=r"eval_share=0\.5: of 1 sequences it leaves none to train on"):
        data.Sequences(folder, 10, 0, 0.5)


# Models


def test_shapes_by_name_and_the_room_they_leave():
    config, folder = gpt2.configuration("gpt2-tiny", 512)
    assert (config.n_layer, config.n_embd, config.n_positions, folder) == (4, 192, 512, None)
    assert gpt2.configuration("gpt2", 128)[0].n_positions == 1024
    xl = gpt2.configuration("gpt2-xl", 128)[0]
    assert (xl.n_layer, xl.n_embd, xl.n_head) == (48, 1600, 25)


def test_a_folder_that_does_not_exist_means_a_fresh_model(caplog):
    caplog.set_level(logging.INFO, "deepfast")
    config, _ = gpt2.configuration("no/such/model", 300)
    assert (config.n_layer, config.n_positions) == (4, 300)
    assert "fresh gpt2-tiny" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json"),
        ("{", "not JSON"),
        ('{"model_type": "bert"}', "model_type is 'bert'"),
        ("[]", "model_type is None"),
        ('{"model_type": "gpt2", "n_embd": "a"}', "describes no GPT-2"),
        ('{"model_type": "gpt2", "n_layer": -1}', "describes no GPT-2"),
        ('{"model_type": "gpt2", "n_head": 7}', "describes no GPT-2"),
        ('{"model_type": "gpt2", "activation_function": "nope"}', "describes no GPT-2"),
        ('{"model_type": "gpt2", "n_positions": 64}', "train_sequence_length=128 is more than the 64 positions"),
    ],
)
def test_folders_that_are_no_gpt2(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        gpt2.configuration(str(tmp_path), 128)


def test_broken_weights_and_tokenizers(tmp_path):
    config, _ = gpt2.configuration("gpt2-tiny", 32)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(gpt2.ModelError, match="weights cannot be read"):
        gpt2.model(config, tmp_path)
    gpt2.model(config, None).save_pretrained(tmp_path)
    gpt2.model(config, tmp_path)
    whole = safetensors.torch.load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in whole.items() if k != "transformer.h.2.mlp.c_fc.weight"}
    safetensors.torch.save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(gpt2.ModelError, match=r"not whole: transformer\.h\.2\.mlp\.c_fc\.weight is missing"):
        gpt2.model(config, tmp_path)
    whole["transformer.ln_f.bias"] = torch.zeros(7)
    safetensors.torch.save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(gpt2.ModelError, match=r"do not fit: transformer\.ln_f\.bias is \[7\], by config\.json \[192\]"):
        gpt2.model(config, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "tf_model.h5")
    with pytest.raises(gpt2.ModelError, match=r"tf_model\.h5: weights in this form are not read"):
        gpt2.model(config, tmp_path)
    with pytest.raises(gpt2.ModelError, match="is a file"):
        gpt2.configuration(str(tmp_path / "tf_model.h5"), 32)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(gpt2.ModelError, match="tokenizer cannot be read"):
        gpt2.tokenizer(tmp_path)


def test_weight_decay_is_for_matrices():
    module = gpt2.model(gpt2.configuration("gpt2-tiny", 32)[0], None)
    decayed, others = gpt2.parameter_groups(module, 0.1)
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(p.dim() < 2 for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(module.parameters()))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_sampling_leaves_training_alone():
    module = gpt2.model(gpt2.configuration("gpt2-tiny", 32)[0], None).half()
    state = torch.get_rng_state()
    ids = gpt2.sample(module, torch.tensor([1, 2, 3]), 20, seed=0)
    assert len(ids) == 23
    assert ids[:3] == [1, 2, 3]
    assert (
        ids
        == gpt2.sample(module, torch.tensor([1, 2, 3]), 20, seed=0)
        != gpt2.sample(module, torch.tensor([1, 2, 3]), 20, seed=1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert module.dtype == torch.float16
    assert len(gpt2.sample(module, torch.tensor([1, 2, 3]), 10_000, seed=0)) == module.config.n_positions


@pytest.mark.filterwarnings("error")
def test_a_sample_remembers_all_that_came_before():
    """Whatever the version of transformers calls its cache: none of its warnings, and what comes out without one."""
    torch.manual_seed(0)
    module = gpt2.model(gpt2.configuration("gpt2-tiny", 64)[0], None)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(5)  # far from uniform
    generator, ids = torch.Generator().manual_seed(7), torch.tensor([[1, 2, 3]])
    for _ in range(20):
        best, index = module(ids, use_cache=False).logits[0, -1].topk(40)
        ids = torch.cat([ids, index[torch.multinomial(best.softmax(-1), 1, generator=generator)][None]], dim=1)
    assert gpt2.sample(module, torch.tensor([1, 2, 3]), 20, seed=7) == ids[0].tolist()
