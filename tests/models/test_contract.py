"""One contract per model: what its class makes of states and rows, found by running the class."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MiniCPM3Config,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from flashhead_dist.decode.body import TransformersBody
from flashhead_dist.decode.loop import decode
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.errors import UserError
from flashhead_dist.heads.distribution import closed_form
from flashhead_dist.heads.registry import build_head
from flashhead_dist.heads.sampling import SamplingParameters, choose_tokens
from flashhead_dist.index import IndexOptions, build_index
from flashhead_dist.integrations.transformers import replace_head, restore_head
from flashhead_dist.models import OutputContract, open_model
from flashhead_dist.models.contract import fit_contract, stored_contract
from flashhead_dist.parallel import TensorParallel

V, D = 301, 32
ALL_PROBES = 76
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip


class ThriceConfig(LlamaConfig):
    """A family that no file of this project names."""

    model_type = "thrice"


class ThriceForCausalLM(LlamaForCausalLM):
    """Llama with scaled states, scaled logits and a cap, under names of its own."""

    config_class = ThriceConfig
    strength, ceiling = 0.75, 7.5

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("logits_to_keep", None)
        output = self.model(*args, **kwargs)
        logits = self.strength * self.lm_head(output.last_hidden_state / 0.5)
        logits = self.ceiling * torch.tanh(logits / self.ceiling)
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)


class UnevenForCausalLM(LlamaForCausalLM):
    """Llama with logits that no contract expresses."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(*args, **kwargs).last_hidden_state)
        return CausalLMOutputWithPast(logits=logits.abs())


class NormedForCausalLM(LlamaForCausalLM):
    """Llama with a layer between body and head."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = nn.functional.layer_norm(self.model(*args, **kwargs).last_hidden_state, [D])
        return CausalLMOutputWithPast(logits=self.lm_head(states))


AutoConfig.register("thrice", ThriceConfig)
AutoModelForCausalLM.register(ThriceConfig, ThriceForCausalLM)


def contract_of(config: Any) -> OutputContract:
    return fit_contract(AutoModelForCausalLM._model_mapping[type(config)], config)


@pytest.mark.parametrize(
    ("config", "scale", "softcap", "tied"),
    [
        (LlamaConfig(**SIZES), 1.0, 0.0, False),
        (Qwen2Config(**SIZES, tie_word_embeddings=True), 1.0, 0.0, True),
        (GPT2Config(vocab_size=V), 1.0, 0.0, True),
        (OPTConfig(vocab_size=V), 1.0, 0.0, True),
        (Gemma2Config(**SIZES, final_logit_softcapping=30.0), 1.0, 30.0, True),
        (Gemma3TextConfig(**SIZES, final_logit_softcapping=12.1), 1.0, 12.1, True),
        (Gemma3TextConfig(**SIZES), 1.0, 0.0, True),
        (CohereConfig(**SIZES, logit_scale=0.0625), 0.0625, 0.0, True),
        (GraniteConfig(**SIZES, logits_scaling=8.0), 0.125, 0.0, False),
        (FalconH1Config(vocab_size=V, lm_head_multiplier=0.01171875), 0.01171875, 0.0, False),
        (MiniCPM3Config(vocab_size=V, hidden_size=2560), 0.1, 0.0, True),
        (ThriceConfig(**SIZES), 1.5, 7.5, False),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_contract_is_what_the_class_does(
    config: Any, scale: float, softcap: float, tied: bool
) -> None:
    found = contract_of(config)
    assert (found.scale, found.softcap, found.tied) == (scale, softcap, tied)
    assert found.vocab_size == V


def test_fitting_leaves_a_models_own_configuration() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.bfloat16)
    before = model.config.to_dict(), model.config._attn_implementation
    fit_contract(type(model), model.config)
    assert (model.config.to_dict(), model.config._attn_implementation) == before


@pytest.mark.parametrize("tied", [False, True])
def test_nested_text_model(tied: bool) -> None:
    text = SIZES | {"final_logit_softcapping": 5.0}
    config = Gemma3Config(text_config=text, tie_word_embeddings=tied)
    found = contract_of(config)
    assert (found.tied, found.vocab_size) == (tied, V)
    assert "lm_head.weight" in found.weight_names


def test_kernels_apply_a_scale_before_the_cap() -> None:
    final = OutputContract(0.5, 0.5, 3.0).final_logits(temperature=2.0)
    products = torch.linspace(-40, 40, 9)
    expected = 3 * torch.tanh(0.25 * products / 3) / 2
    assert torch.allclose(final.without_noise(products), expected)


@pytest.mark.parametrize(
    ("model_class", "config", "message"),
    [
        (None, PhiConfig(**SIZES), "PhiForCausalLM.*bias"),
        (None, BertConfig(**SIZES), "BertLMHeadModel"),
        (UnevenForCausalLM, LlamaConfig(**SIZES), "UnevenForCausalLM.*multiple"),
        (NormedForCausalLM, LlamaConfig(**SIZES), "NormedForCausalLM.*factor"),
        (None, CohereConfig(**SIZES, logit_scale=-1.0), "CohereForCausalLM.*scales"),
    ],
    ids=["bias", "encoder", "logits", "states", "negative"],
)
def test_what_a_contract_cannot_express_is_refused_by_name(
    model_class: type | None, config: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fit_contract(model_class or AutoModelForCausalLM._model_mapping[type(config)], config)


def test_contract_is_cached_and_found_without_loading_transformers(tmp_path: Path) -> None:
    config = GraniteConfig(**SIZES, logits_scaling=4.0)
    config.save_pretrained(tmp_path)
    program = (
        "import sys; from pathlib import Path; "
        "from flashhead_dist.models.contract import stored_contract; "
        f"print(stored_contract(Path({str(tmp_path)!r}, 'config.json'), "
        f"Path({str(tmp_path)!r}, 'cache')).scale, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["0.25", "False"], done.stderr
    (cached,) = (tmp_path / "cache/contracts").glob("*.json")
    document = json.loads(cached.read_text())
    cached.write_text(json.dumps(document | {"logit_scale": 9.0}))
    assert stored_contract(tmp_path / "config.json", tmp_path / "cache").scale == 9.0
    config.logits_scaling = 2.0
    config.save_pretrained(tmp_path)
    assert stored_contract(tmp_path / "config.json", tmp_path / "cache").scale == 0.5


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHHEAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A small model of the new family, its folder and its index."""
    folder = tmp_path_factory.mktemp("thrice")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ThriceConfig(**SIZES)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder / "model")
    options = IndexOptions(num_groups=2, num_probes=4, alpha=0.02, group_size=32)
    index = build_index(
        open_model(str(folder / "model")), options, calibration=None, test=None,
        out=folder / "index", device="cpu", progress=False,
    )  # fmt: skip
    return model, folder / "model", index


@torch.no_grad()
def test_new_family_decodes_like_its_own_class(family: tuple[Any, Path, Path]) -> None:
    """build_index, a head that probes everything, and the distribution that it samples from."""
    model, folder, index = family
    source = open_model(str(folder))
    tp = TensorParallel.single()
    head = build_head("flashhead", tp=tp, model=source, index_dir=index, num_probes=ALL_PROBES)
    prompt = torch.tensor([[5, 17, 201]])
    state = TransformersBody(model).prefill(prompt, None)
    logits = model(prompt).logits[:, -1]
    form = closed_form(head, state, contract=source.contract)
    expected = logits.log_softmax(1)
    assert torch.allclose(form.unnormalized().log_softmax(1), expected, atol=1e-4)
    plain = closed_form(head, state).unnormalized().log_softmax(1)
    assert not torch.allclose(plain, expected, atol=0.1)
    text = DecodeState(prompt.tolist(), max_new_tokens=12, stop_token_ids=frozenset({1}))
    greedy = SamplingParameters()
    decode(
        TransformersBody(model),
        text,
        lambda *step: choose_tokens(head, *step, greedy, contract=source.contract),
    )
    generated = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert text.tokens(0) == generated[0, prompt.shape[1] :].tolist()


@torch.no_grad()
def test_new_family_keeps_its_logits_when_its_head_is_replaced(
    family: tuple[Any, Path, Path],
) -> None:
    model, folder, index = family
    replaced = AutoModelForCausalLM.from_pretrained(folder).eval()
    replace_head(replaced, index, num_probes=ALL_PROBES)
    prompt = torch.tensor([[5, 17, 201]])
    assert torch.allclose(replaced(prompt).logits, model(prompt).logits, atol=1e-4)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    for more in ({}, {"repetition_penalty": 1.3}):
        found = replaced.generate(prompt, **options, **more)
        assert torch.equal(found, model.generate(prompt, **options, **more))
    restored = restore_head(replaced)
    assert torch.equal(restored.lm_head.weight, model.lm_head.weight)
    assert torch.allclose(restored(prompt).logits, model(prompt).logits, atol=1e-6)
