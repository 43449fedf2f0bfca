"""The head of a GGUF file: slices of every block format equal the whole dequantized tensor."""

from __future__ import annotations

import hashlib
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from flashhead_dist.errors import UserError
from flashhead_dist.models import open_model

V, D = 203, 64


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path / "cache"))


def write_gguf(
    path: Path, tensors: dict[str, np.ndarray], kind: Kind, *, nested: bool = True
) -> None:
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.add_final_logit_softcapping(30.0)
    # The header reader must step over arrays of strings and of numbers, and nested ones.
    writer.add_token_list([f"token-{i}" for i in range(V)])
    writer.add_token_scores([float(i) for i in range(V)])
    if nested:
        writer.add_array("test.nested", [[1, 2], [3, 4]])
    writer.add_bool("test.flag", True)
    for name, values in tensors.items():
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_rows(seed: int, rows: int = V) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, D), dtype=np.float32)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1])
def test_slices_equal_the_whole(tmp_path: Path, kind: Kind) -> None:
    values = random_rows(0)
    write_gguf(tmp_path / "m.gguf", {"token_embd.weight": values}, kind)
    model = open_model(str(tmp_path / "m.gguf"))
    whole = torch.from_numpy(dequantize(quantize(values, kind), kind)).to(model.dtype)
    expected_dtype = {Kind.F32: torch.float32, Kind.F16: torch.float16}.get(kind, torch.bfloat16)
    assert model.dtype == expected_dtype
    assert (model.vocab_size, model.hidden_size, model.tied) == (V, D, True)
    for start, stop in ((0, V), (0, 1), (77, 150), (V - 1, V), (9, 9)):
        assert torch.equal(model.read_rows(start, stop), whole[start:stop])
    assert torch.equal(model.read_columns(5, 40), whole[:, 5:40])
    assert model.name == "m"


def test_output_weight_comes_before_the_input_embedding(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": random_rows(0), "output.weight": random_rows(1)}
    write_gguf(tmp_path / "m.gguf", tensors, Kind.F32)
    model = open_model(str(tmp_path / "m.gguf"))
    assert not model.tied
    assert torch.equal(model.read_rows(0, V), torch.from_numpy(tensors["output.weight"]))


def test_hash_is_over_the_stored_blocks(tmp_path: Path) -> None:
    values = random_rows(0)
    write_gguf(tmp_path / "m.gguf", {"token_embd.weight": values}, Kind.Q8_0)
    stored = quantize(values, Kind.Q8_0).tobytes()
    expected = hashlib.sha256(stored).hexdigest()
    assert open_model(str(tmp_path / "m.gguf")).weight_hash == expected


def test_only_the_asked_rows_are_read(tmp_path: Path) -> None:
    values = random_rows(0, rows=40_000)
    write_gguf(tmp_path / "m.gguf", {"token_embd.weight": values}, Kind.Q8_0)

    def bytes_read() -> int:
        fields = dict(x.split(": ") for x in Path("/proc/self/io").read_text().splitlines())
        return int(fields["rchar"])

    model = open_model(str(tmp_path / "m.gguf"))
    before = bytes_read()
    rows = model.read_rows(10_000, 11_000)
    read = bytes_read() - before
    stored = 1000 * (D // 32) * 34
    assert stored <= read < stored + 20_000
    assert torch.allclose(rows.float(), torch.from_numpy(values[10_000:11_000]), atol=0.05)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, {"token_embd.weight": random_rows(0)}, Kind.F32)
    content = path.read_bytes()
    path.write_bytes(content[: -V * D])
    with pytest.raises(UserError, match=r"m\.gguf is truncated"):
        open_model(str(path))
    path.write_bytes(content[:500])
    with pytest.raises(UserError, match=r"m\.gguf is truncated or no GGUF"):
        open_model(str(path))
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"m\.gguf is truncated or no GGUF"):
        open_model(str(path))


def test_file_without_an_embedding_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {"blk.0.attn_q.weight": random_rows(0)}, Kind.F32)
    with pytest.raises(UserError, match=r"no output\.weight and no token_embd"):
        open_model(str(tmp_path / "m.gguf"))


def test_contract_is_that_of_transformers_class(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {"token_embd.weight": random_rows(0)}, Kind.F32, nested=False)
    assert open_model(str(tmp_path / "m.gguf")).contract.softcap == 30.0
