"""FlashHead over a four-bit body: the text is that of the dense head over the same body."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from flashhead_dist.decode.body import TransformersBody
from flashhead_dist.decode.loop import decode
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.errors import UserError
from flashhead_dist.heads.registry import HeadBuilder
from flashhead_dist.heads.sampling import SamplingParameters, choose_tokens
from flashhead_dist.integrations.quantized_make import write_w4a16
from flashhead_dist.integrations.transformers import replace_head
from flashhead_dist.models import ModelSourceError, open_model
from flashhead_dist.models.quantized import Int4Linear
from flashhead_dist.parallel import TensorParallel
from tests.integrations.transformers_models import PROMPT, make_index, make_model

pytest.importorskip("compressed_tensors")
NEW_TOKENS = 24
GREEDY = SamplingParameters()


@pytest.fixture(scope="module", params=["gemma3", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, its W4A16 copy, and the index of the former, which probes everything."""
    place = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHHEAD_CACHE", str(place / "cache"))
        model = make_model(request.param, tied=False).to(torch.bfloat16)
        make_index(model, place, num_probes=128)
        tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(place / "model")
        write_w4a16(open_model(str(place / "model")), place / "w4a16")
    return place


def load(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
    return open_model(str(folder / name)).load_body(dtype)[0]


def generate(model: Any) -> list[int]:
    found = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    tokens: list[int] = found[0, len(PROMPT) :].tolist()
    return tokens


def test_every_layer_but_the_head_stays_in_four_bits(folder: Path) -> None:
    body = load(folder, "w4a16")
    kinds = {name: type(m) for name, m in body.named_modules() if hasattr(m, "in_features")}
    assert kinds.pop("lm_head") is torch.nn.Linear
    assert set(kinds.values()) == {Int4Linear}
    assert len(kinds) == 14
    stored = json.loads((folder / "w4a16" / "config.json").read_text())["quantization_config"]
    assert stored["format"] == "pack-quantized"


def test_transformers_text_is_the_quantized_dense_models(folder: Path) -> None:
    dense = load(folder, "w4a16")
    replaced = replace_head(copy.deepcopy(dense), folder / "index")
    text = generate(dense)
    assert len(set(text)) > NEW_TOKENS / 4
    assert generate(replaced) == text
    # Another body's text: or the two models above would agree whatever ran below the head.
    assert generate(load(folder, "model")) != text


def test_our_loops_text_is_the_quantized_dense_heads(folder: Path) -> None:
    """A decoder called by itself has no weights at all where the checkpoint was not settled."""
    source = open_model(str(folder / "w4a16"))
    builder = HeadBuilder(
        tp=TensorParallel.single(torch.device("cpu")),
        model=source,
        index_dir=folder / "index",
        dtype=torch.float32,
    )
    body = TransformersBody(load(folder, "w4a16"))
    texts = []
    for name in ("dense_local_max", "flashhead"):
        head = builder.build(name)
        state = DecodeState([PROMPT], max_new_tokens=NEW_TOKENS)
        decode(body, state, lambda *given, head=head: choose_tokens(head, *given, GREEDY))
        texts.append(state.tokens(0))
    assert texts[0] == texts[1] == generate(load(folder, "w4a16"))


def test_a_body_is_not_quantized_twice(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantized already"):
        write_w4a16(open_model(str(folder / "w4a16")), tmp_path / "again")
    with pytest.raises(UserError, match="groups of 7 columns do not divide a layer of 64"):
        write_w4a16(open_model(str(folder / "model")), tmp_path / "sevens", 7)


def test_a_missing_package_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("compressed_tensors")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(UserError, match=r"\.\[quantized\]"):
        write_w4a16(open_model(str(folder / "model")), tmp_path / "never")
    with pytest.raises(ModelSourceError, match="compressed"):
        load(folder, "w4a16")
