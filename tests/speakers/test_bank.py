"""A bank is whole, of one encoder and of one corpus, or it is refused; opening it reads nothing."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from banks import arrays, written

from snac_core.errors import UserError
from snac_core.speakers.bank import HEADER, Bank, open_bank
from snac_core.speakers.encoder import load_speaker_encoder
from snac_core.speakers.index import build_index, open_index


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return written(tmp_path / "bank", arrays(10, 5))


def file_of(bank: Bank, name: str) -> Path:
    return bank.folder / bank.header.files[name][0]


def test_what_is_written_comes_back_as_maps(bank: Bank) -> None:
    parts = arrays(10, 5)
    for name, values in parts.items():
        assert isinstance(getattr(bank, name), np.memmap)
        assert np.array_equal(getattr(bank, name), values)
    assert bank.ids[7] == "u000007"
    assert bank.names[3] == "s0003"
    first, last = bank.header.speaker_splits["dev"]
    assert bank.names[first:last] == ["s0008", "s0009"]
    assert np.array_equal(bank.reference[first:last], parts["reference"][8:])


def test_equal_content_gives_equal_bytes_and_replacing_leaves_nothing_behind(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    written(one, arrays(10, 5))
    written(two, arrays(6, 3))
    (two / ".embeddings.k1ll3d.npy").write_bytes(b"half")
    written(two, arrays(10, 5))
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


def test_rows_are_found_by_what_was_heard(bank: Bank) -> None:
    keys = np.stack([bank.keys[4], np.zeros(32, np.uint8), bank.keys[49], bank.keys[0]])
    assert bank.find(keys).tolist() == [4, -1, 49, 0]
    assert bank.find_speakers(bank.speaker_keys[[2]]).tolist() == [2]


def test_other_encoders_are_refused(bank: Bank) -> None:
    with pytest.raises(UserError, match=r"bank of speaker encoder 'synthetic' .*expected 'ecapa_tiny'.*--encoder"):
        open_bank(bank.folder, encoder=load_speaker_encoder("ecapa_tiny"))
    assert len(open_bank(bank.folder)) == 50


@pytest.mark.parametrize("name", ["embeddings", "labels", "keys", "reference", "utterances"])
def test_a_truncated_or_missing_file_is_named(bank: Bank, name: str) -> None:
    path = file_of(bank, name)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(UserError, match=rf"{path.name} is truncated: {len(whole) - 7} of {len(whole)} bytes"):
        open_bank(bank.folder)
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} is missing"):
        open_bank(bank.folder)


def test_changed_bytes_are_found_when_they_are_looked_for(bank: Bank) -> None:
    path = file_of(bank, "embeddings")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="is damaged"):
        open_bank(bank.folder).verify()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "files": 3}', '{"format": 9}'])
def test_a_header_that_is_none_is_the_users_error(bank: Bank, text: str) -> None:
    (bank.folder / HEADER).write_text(text)
    with pytest.raises(UserError, match="rebuild it"):
        open_bank(bank.folder)


def test_a_folder_without_a_bank_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make one with `runner index build`"):
        open_bank(tmp_path)


def test_not_a_number_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    parts = arrays(10, 5)
    parts["embeddings"][17, 3] = np.nan
    with pytest.raises(UserError, match="'synthetic' gives NaN or infinite values for 'u000017'"):
        written(tmp_path / "bank", parts)
    assert not (tmp_path / "bank").exists()


def test_a_reader_sees_the_old_bank_or_the_new_one_while_it_is_replaced(tmp_path: Path) -> None:
    versions = [arrays(10, 5, seed=seed) for seed in (1, 2)]
    written(tmp_path, versions[0])
    done = threading.Event()

    def replace() -> None:
        for turn in range(12):
            written(tmp_path, versions[turn % 2])
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    seen = 0
    while not done.is_set():
        bank = open_bank(tmp_path)
        assert any(
            np.array_equal(bank.embeddings, v["embeddings"]) and np.array_equal(bank.keys, v["keys"]) for v in versions
        )
        seen += 1
    writer.join()
    assert seen


def test_the_index_finds_what_comparing_all_finds(bank: Bank) -> None:
    built, _ = build_index(bank)
    index = open_index(bank)
    assert built.header == index.header
    assert (index.header.kind, index.header.recall) == ("Flat", 1.0)
    queries = torch.from_numpy(np.array(bank.embeddings[:6]))
    cosines, rows = index.search(queries, 8)
    exact = (queries @ torch.from_numpy(np.array(bank.embeddings)).T).topk(8)
    torch.testing.assert_close(cosines, exact.values)
    assert torch.equal(rows, exact.indices)
    assert index.search(queries, 60)[1][:, 50:].eq(-1).all(), "there are only 50"


def test_many_embeddings_get_an_index_of_cells_and_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snac_core.speakers.index.FLAT_UP_TO", 500)
    monkeypatch.setattr("snac_core.speakers.index.TRAINED_ON", 12)
    bank = written(tmp_path, arrays(120, 6))
    header = build_index(bank)[0].header
    assert (header.kind, header.trained_on, header.rows) == ("IVF64,PQ8x4fs", 720, 720)
    assert header.recall > 0.5
    assert header.bytes < file_of(bank, "embeddings").stat().st_size
    first = {p.name for p in tmp_path.iterdir()}
    build_index(bank)
    assert {p.name for p in tmp_path.iterdir()} == first, "the same bank, the same index"


def test_another_banks_index_or_a_damaged_one_is_refused(bank: Bank, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no index in the folder of the bank"):
        open_index(bank)
    build_index(bank)
    other = written(bank.folder, arrays(10, 5, seed=3))
    with pytest.raises(UserError, match="is of other embeddings than the bank"):
        open_index(other)
    index = build_index(other)[0]
    path = other.folder / index.header.file
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="is truncated"):
        open_index(other)
    header = json.loads((other.folder / "index.json").read_text())
    path.write_bytes(b"x" * header["bytes"])
    with pytest.raises(UserError, match="is damaged"):
        open_index(other)
    (other.folder / "index.json").write_text("{}")
    with pytest.raises(UserError, match="not a header of an index"):
        open_index(other)
