"""A stored index that is not as it was written is refused by whoever reads the damaged part."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from flashhead_dist.index import HeadIndexError, load_manifest, load_shard

TP_SIZE, GROUPS = 3, 8
DATA, MANIFEST = "index.safetensors", "manifest.json"


@pytest.fixture
def index(tied_index: Path, tmp_path: Path) -> Path:
    """A copy of `tied_index`, to be damaged."""
    shutil.copytree(tied_index, tmp_path / "index")
    return tmp_path / "index"


@contextmanager
def _flipped(file: Path, offset: int, bit: int = 0) -> Iterator[None]:
    """The byte at `offset` with one bit changed, for as long as this lasts."""
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1 << bit]))
    try:
        yield
    finally:
        with file.open("r+b") as stream:
            stream.seek(offset)
            stream.write(bytes([byte]))


def _refused(index: Path, file: str, tp_rank: int = 0, tp_size: int = 1) -> None:
    with pytest.raises(HeadIndexError) as refusal:
        load_shard(index, tp_rank=tp_rank, tp_size=tp_size)
    message = str(refusal.value)
    assert str(index / file) in message
    assert "launch/build_index.py" in message
    assert message.endswith(".")
    assert "\n" not in message


def _stored_tensors(index: Path) -> dict[str, tuple[int, int]]:
    """Offsets in the file at which each tensor begins and ends."""
    stored = (index / DATA).read_bytes()
    length = int.from_bytes(stored[:8], "little")
    header = json.loads(stored[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for name, entry in header.items()
    }


def test_one_byte_of_the_header_is_noticed_by_every_rank(index: Path) -> None:
    end = min(begin for begin, _ in _stored_tensors(index).values())
    for offset in [*range(8), *range(8, end, 5), end - 1]:
        with _flipped(index / DATA, offset, bit=offset % 8):
            _refused(index, DATA, tp_rank=offset % TP_SIZE, tp_size=TP_SIZE)


def test_one_byte_of_a_tensor_is_noticed_by_the_rank_that_reads_it(index: Path) -> None:
    tensors = _stored_tensors(index)
    assert set(tensors) == {
        "centroid_scales",
        "centroid_values",
        "pinned_rows",
        "pinned_token_ids",
        "rows",
        "spread",
        "token_ids",
    }
    for begin, end in tensors.values():
        group_bytes = (end - begin) // GROUPS
        middle = begin + 5 * group_bytes + group_bytes // 2
        for offset in (begin, begin + group_bytes - 1, begin + group_bytes, middle, end - 1):
            owner = (offset - begin) // group_bytes % TP_SIZE
            with _flipped(index / DATA, offset, bit=offset % 8):
                for rank in range(TP_SIZE):
                    if rank == owner:
                        _refused(index, DATA, rank, TP_SIZE)
                    else:
                        load_shard(index, tp_rank=rank, tp_size=TP_SIZE)


@pytest.mark.parametrize("name", ["token_ids", "pinned_token_ids"])
def test_damaged_ids_of_another_rank_are_noticed_by_the_map_of_tokens(
    index: Path, name: str
) -> None:
    begin, _ = _stored_tensors(index)[name]
    with _flipped(index / DATA, begin):
        shard = load_shard(index, tp_rank=1, tp_size=TP_SIZE)
        with pytest.raises(HeadIndexError, match=r"damaged.*--force"):
            shard.token_location(torch.tensor([0]))
    load_shard(index, tp_rank=1, tp_size=TP_SIZE).token_location(torch.tensor([0]))


def test_a_group_in_the_place_of_another_is_noticed(index: Path) -> None:
    stored = bytearray((index / DATA).read_bytes())
    for begin, end in _stored_tensors(index).values():
        size = (end - begin) // GROUPS
        stored[begin : begin + size] = stored[begin + size : begin + 2 * size]
    (index / DATA).write_bytes(stored)
    _refused(index, DATA)


def test_one_byte_of_the_manifest_is_noticed(index: Path) -> None:
    size = (index / MANIFEST).stat().st_size
    for offset in [*range(0, size, 3), size - 1]:
        for bit in (0, 5):
            with (
                _flipped(index / MANIFEST, offset, bit),
                pytest.raises(HeadIndexError, match=r"launch/build_index\.py") as refusal,
            ):
                load_manifest(index)
            assert str(index) in str(refusal.value)
    load_manifest(index)


def test_blanks_and_reordered_entries_of_the_manifest_are_noticed(index: Path) -> None:
    stored = (index / MANIFEST).read_text()
    document = json.loads(stored)
    for changed in (
        stored + "\n",
        stored.replace('": ', '":  ', 1),
        json.dumps(document),
        json.dumps(dict(reversed(document.items())), indent=1) + "\n",
    ):
        (index / MANIFEST).write_text(changed)
        _refused(index, MANIFEST)
    (index / MANIFEST).write_text(stored)
    load_shard(index)


def test_a_manifest_of_another_schema_says_so(index: Path) -> None:
    document = json.loads((index / MANIFEST).read_text())
    (index / MANIFEST).write_text(json.dumps(document | {"schema_version": 99}))
    with pytest.raises(HeadIndexError, match=r"another version.*build it again"):
        load_manifest(index)


def test_the_manifest_of_another_index_is_noticed(index: Path) -> None:
    """A manifest that is intact in itself, but whose file is not the one beside it."""
    size = (index / DATA).stat().st_size
    stored = (index / DATA).read_bytes()
    (index / DATA).write_bytes(stored[:8] + stored[8:][::-1])
    assert (index / DATA).stat().st_size == size
    _refused(index, DATA)


@pytest.mark.parametrize("name", [DATA, MANIFEST])
def test_truncated_and_extended_files_are_noticed(index: Path, name: str) -> None:
    stored = (index / name).read_bytes()
    for kept in (0, 1, 7, 8, 100, len(stored) // 2, len(stored) - 1):
        (index / name).write_bytes(stored[:kept])
        for rank in range(TP_SIZE):
            _refused(index, name, rank, TP_SIZE)
    (index / name).write_bytes(stored + b"\0")
    _refused(index, name)
    (index / name).write_bytes(stored)
    load_shard(index)


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b"{}", b"\xff\xfe", b"{"])
def test_a_manifest_that_is_something_else_is_noticed(index: Path, content: bytes) -> None:
    (index / MANIFEST).write_bytes(content)
    _refused(index, MANIFEST)


def test_a_header_of_absurd_length_is_noticed(index: Path) -> None:
    with (index / DATA).open("r+b") as stream:
        stream.write(b"\xff" * 8)
    _refused(index, DATA)


def test_missing_files_are_named(index: Path, tmp_path: Path) -> None:
    (index / DATA).unlink()
    _refused(index, DATA)
    (index / DATA).mkdir()
    _refused(index, DATA)
    with pytest.raises(HeadIndexError, match=r"holds no index.*launch/build_index\.py") as refusal:
        load_shard(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(refusal.value)
