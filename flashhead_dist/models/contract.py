"""What lies between a model's last hidden state and its logits, found by running its own class.

    logits = softcap * tanh(logit_scale * (state_scale * hidden_states) @ rows.T / softcap)

The class is built from the configuration without weights (on the meta device). Its body and its
output layer are then replaced by known values: what reaches the output layer gives the scale of
the states, and what the class makes of known products gives the scale and the cap of the logits.
No configuration key is read, so a family that this project has never seen is served or refused
like any other. Results are cached by configuration and transformers version.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashhead_dist.errors import ModelSourceError
from flashhead_dist.models.cache import call_in_process, file_fingerprint, make_once
from flashhead_kernels.noise import FinalLogits, GumbelNoise

_SCHEMA_VERSION = 1
_TOKENS = 3
_GREAT, _SMALL = 2.0**40, 2.0**-20
"""Products that show a cap alone and a scale alone."""
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class OutputContract:
    """Scales are above 0; `softcap` is 0 where there is none.

    tied: whether the output embedding is the input embedding. weight_names: the output embedding's
    names among the model's parameters. vocab_size: its rows; 0 where no class was run.
    """

    state_scale: float = 1.0
    logit_scale: float = 1.0
    softcap: float = 0.0
    tied: bool = False
    weight_names: tuple[str, ...] = ()
    vocab_size: int = 0

    @property
    def scale(self) -> float:
        """Of the products of hidden states and rows."""
        return self.state_scale * self.logit_scale

    @property
    def after_head(self) -> OutputContract:
        """What remains to be done with the products that the model's own output layer makes."""
        return replace(self, state_scale=1.0)

    @property
    def is_plain(self) -> bool:
        """Whether logits are the products of hidden states and rows."""
        return self.scale == 1 and self.softcap == 0

    def final_logits(
        self, temperature: float = 1.0, noise: GumbelNoise | None = None
    ) -> FinalLogits:
        """What kernels do with products: the scale becomes part of the temperature and the cap.

        Raises ValueError for a temperature not above 0.
        """
        return FinalLogits(self.softcap / self.scale, temperature / self.scale, noise)


PLAIN = OutputContract()


def fit_contract(model_class: type, config: Any) -> OutputContract:
    """The contract of a transformers causal language model of this class and configuration.

    Raises ModelSourceError, which names the class, where it cannot be expressed: a bias, a layer
    between the body and the output embedding, logits that depend on anything but their products.
    """
    name = model_class.__name__
    try:
        model = _without_weights(model_class, config)
        head = model.get_output_embeddings()
    except Exception as error:  # Any class of any author runs here.
        raise _refused(name, f"transformers cannot build it ({_first_line(error)})") from error
    if not isinstance(head, nn.Linear):
        raise _refused(name, f"its output head is {type(head).__name__}, not a linear layer")
    if head.bias is not None:
        raise _refused(name, "its output head has a bias, which an index does not hold")
    states = torch.linspace(-1, 1, _TOKENS * head.in_features, dtype=torch.float64)
    states = states.view(1, _TOKENS, -1)
    products = torch.linspace(-60, 60, 61, dtype=torch.float64)
    products = torch.cat([torch.tensor([_GREAT, _SMALL], dtype=torch.float64), products])
    try:
        given, logits = _run(model, head, states, products)
    except Exception as error:
        raise _refused(name, f"its body cannot be replaced ({_first_line(error)})") from error
    if len(given) != 1 or given[0].shape != states.shape:
        raise _refused(name, "its output head is not called once, on every last hidden state")
    state_scale = _rounded(
        float((given[0].double() * states).sum() / states.square().sum()), given[0]
    )
    if not torch.allclose(given[0].double(), state_scale * states, rtol=_TOLERANCE, atol=1e-7):
        raise _refused(name, "it changes hidden states by more than a factor before its head")
    if not 0 < state_scale < float("inf"):
        raise _refused(name, f"it scales hidden states by {state_scale:.6g}")
    logit_scale, softcap = _fit_logits(name, logits, products)
    return OutputContract(
        state_scale=state_scale,
        logit_scale=logit_scale,
        softcap=softcap,
        tied=model.get_input_embeddings().weight is head.weight,
        weight_names=tuple(
            key
            for key, parameter in model.named_parameters(remove_duplicate=False)
            if parameter is head.weight
        ),
        vocab_size=head.out_features,
    )


def stored_contract(config: Path, cache: Path) -> OutputContract:
    """The contract of the model that a `config.json` or a .gguf file describes, from the cache.

    transformers is loaded by another process where this one has not loaded it, so that the memory
    of a rank does not grow by it. Raises ModelSourceError as `fit_contract`.
    """
    # A GGUF file is too large to hash each time.
    is_gguf = config.suffix == ".gguf"
    content = file_fingerprint(config).encode() if is_gguf else config.read_bytes()
    key = f"{_SCHEMA_VERSION}|{version('transformers')}|".encode() + content

    def write(target: Path) -> None:
        if "transformers" in sys.modules:
            write_contract(config, target)
        else:
            call_in_process(
                write_contract, config, target, remedy="free 1 GB of memory and run again"
            )

    made = make_once(cache / "contracts" / f"{hashlib.sha256(key).hexdigest()}.json", write)
    found = json.loads(made.read_text(encoding="utf-8"))
    return OutputContract(**(found | {"weight_names": tuple(found["weight_names"])}))


def write_contract(config: str | Path, target: str | Path) -> None:
    """Write `stored_contract`'s file; raises ModelSourceError as it does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(config)
    named = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    try:
        found = AutoConfig.from_pretrained(path.parent, **named)
    except Exception as error:
        raise ModelSourceError(
            f"{path} describes no model that transformers {version('transformers')} can build "
            f"({_first_line(error)}); fetch the model again, or use another."
        ) from error
    classes: Any = AutoModelForCausalLM._model_mapping
    if type(found) not in classes:
        raise ModelSourceError(
            f"{path} describes a {found.model_type} model, which is no causal language model of "
            "transformers; use one such as Llama, Qwen2, Qwen3 or Gemma-3."
        )
    contract = fit_contract(classes[type(found)], found)
    Path(target).write_text(json.dumps(asdict(contract)), encoding="utf-8")


def _without_weights(model_class: Any, config: Any) -> Any:
    # transformers writes its dtype and attention into the configuration.
    own = copy.deepcopy(config)
    with torch.device("meta"):
        model = model_class._from_config(own, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


class _BodyOutput:
    """What a body returns, by either of its names; every other field is None."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: Any) -> Any:
        return self.last_hidden_state if place == 0 else ()


def _run(
    model: Any, head: nn.Linear, states: Tensor, products: Tensor
) -> tuple[list[Tensor], Tensor]:
    """What reaches `head` from a body that returns `states`, and logits for these `products`."""
    given: list[Tensor] = []

    def head_forward(hidden_states: Tensor) -> Tensor:
        given.append(hidden_states)
        return products.expand(*hidden_states.shape[:-1], -1)

    def body_forward(*_: Any, **__: Any) -> _BodyOutput:
        return _BodyOutput(states)

    for body in (model.get_decoder(), model.base_model):
        if body is not model:
            body.forward = body_forward
    untyped: Any = head
    untyped.forward = head_forward
    token_ids = torch.zeros((1, states.shape[1]), dtype=torch.int64)
    with torch.no_grad():
        logits: Tensor = model(input_ids=token_ids, use_cache=False).logits
    return given, logits


def _fit_logits(name: str, logits: Tensor, products: Tensor) -> tuple[float, float]:
    """Scale and soft cap (0 for none) with which `products [n]` become `logits [1, L, n]`."""
    flat = logits.reshape(-1, logits.shape[-1])
    if flat.shape != (_TOKENS, len(products)):
        raise _refused(name, f"it makes {tuple(logits.shape)} of {_TOKENS} tokens' logits")
    great, small = float(flat[0, 0]), float(flat[0, 1])
    scale = _rounded(small / _SMALL, logits)
    softcap = 0.0 if abs(great - scale * _GREAT) <= _TOLERANCE * abs(great) else great
    softcap = _rounded(softcap, logits)
    if not (0 < scale < float("inf") and 0 <= softcap < float("inf")):
        raise _refused(name, f"it scales logits by {scale:.6g} and caps them at {softcap:.6g}")
    expected = OutputContract(1.0, scale, softcap).final_logits().without_noise(products)
    if not torch.allclose(flat.double(), expected.expand_as(flat), rtol=_TOLERANCE, atol=1e-7):
        raise _refused(name, "its logits are neither a multiple of the head's nor soft-capped")
    return scale, softcap


def _rounded(value: float, measured: Tensor) -> float:
    """`value` to the digits that the arithmetic of `measured` carries: 30, not 30.000001."""
    return float(f"{value:.{12 if measured.dtype is torch.float64 else 7}g}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _refused(name: str, reason: str) -> ModelSourceError:
    return ModelSourceError(
        f"The output head of {name} cannot be replaced: {reason}; use a model whose logits are "
        "products of its last hidden states, scaled or soft-capped."
    )
