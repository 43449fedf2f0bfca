"""The user's options of FlashHead in vLLM, and the configurations that are refused at start."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flashhead_dist.errors import UserError

if TYPE_CHECKING:
    from flashhead_dist.index import IndexManifest

KEY = "flashhead"
"""Of vLLM's `--additional-config`, and the name of an index folder within a model's folder."""

MEASURE, NEVER = "measure", "never"
OLDEST, BEFORE = (0, 32), (0, 33)
"""Supported versions of vLLM, whose extension points change between minor versions."""


@dataclass(frozen=True, kw_only=True)
class FlashHeadOptions:
    """`--additional-config '{"flashhead": {"index": "DIR", ...}}'`.

    Raises:
        UserError: a value outside its range.
    """

    index: Path
    """Folder that launch/build_index.py wrote for the model."""
    num_probes: int | None = None
    """Clusters probed for a greedy row; the index's own where None."""
    alpha: float | None = None
    """Weight of a cluster's spread; the index's own where None."""
    crossover: int | str = MEASURE
    """From how many rows on a batch is served by the dense path: a number, "measure" (at start,
    cached for the next one) or "never"."""

    def __post_init__(self) -> None:
        crossover, probes, alpha = self.crossover, self.num_probes, self.alpha
        is_count = _is_int(crossover) and int(crossover) >= 1
        self._check(
            "crossover",
            crossover in (MEASURE, NEVER) or is_count,
            f'a number of rows above 0, "{MEASURE}" or "{NEVER}"',
        )
        self._check("num_probes", probes is None or _is_int(probes), "an integer")
        self._check("alpha", alpha is None or isinstance(alpha, int | float), "a number")

    def _check(self, name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            raise UserError(
                f'flashhead option "{name}": {getattr(self, name)!r} is not {expected}: give one, '
                "or leave it out for the default"
            )

    @classmethod
    def parse(cls, asked: Any) -> Self:
        """The options under `KEY`: a mapping, or the index folder as a string.

        Raises:
            UserError: anything else, an option that does not exist, no index.
        """
        if isinstance(asked, str | Path):
            asked = {"index": asked}
        if not isinstance(asked, Mapping):
            raise UserError(
                f'additional config "{KEY}": {asked!r} is not understood: give an index folder, or '
                f'{{"index": "DIR"}}, or false to switch FlashHead off'
            )
        names = [field.name for field in fields(cls)]
        for name in asked:
            if name not in names:
                raise UserError(
                    f"there is no flashhead option {name!r}: choose from {', '.join(names)}"
                )
        if not isinstance(asked.get("index"), str | Path):
            raise UserError(
                f'additional config "{KEY}" names no index folder: build one with '
                'launch/build_index.py and give it as {"index": "DIR"}'
            )
        return cls(**{**asked, "index": Path(asked["index"]).expanduser()})


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def options_of(vllm_config: Any) -> FlashHeadOptions | None:
    """The options of a vLLM configuration; None where FlashHead is off.

    From its `additional_config`, else an index in the folder `flashhead` of a local model.

    Raises:
        UserError: see `FlashHeadOptions.parse`.
    """
    additional = vllm_config.additional_config
    asked = additional.get(KEY) if isinstance(additional, Mapping) else None
    if asked is False:
        return None
    if asked is not None:
        return FlashHeadOptions.parse(asked)
    if vllm_config.model_config is None:
        return None
    beside = Path(vllm_config.model_config.model) / KEY
    return FlashHeadOptions(index=beside) if beside.is_dir() else None


def unsupported_version(version: str) -> str | None:
    """Why this version of vLLM is not supported, or None."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and OLDEST <= (int(found[1]), int(found[2])) < BEFORE:
        return None
    oldest, before = (".".join(map(str, numbers)) for numbers in (OLDEST, BEFORE))
    return (
        f"FlashHead works with vLLM {oldest} up to, but not including, {before}, and this is "
        f"{version}: install one of these, or start without the flashhead option"
    )


def refuse(vllm_config: Any, manifest: IndexManifest, vllm_version: str) -> None:
    """Check a configuration of vLLM against what the plugin does and an index.

    Raises:
        UserError: the first thing that FlashHead does not serve.
    """
    reason = unsupported_version(vllm_version)
    if reason is not None:
        raise UserError(reason)
    config, model = vllm_config, vllm_config.model_config
    if config.use_v2_model_runner:
        raise _refusal(
            "needs vLLM's V1 model runner, which reports each request's parameters before a step",
            "set VLLM_USE_V2_MODEL_RUNNER=0",
        )
    if config.speculative_config is not None:
        raise _refusal(
            f"does not serve speculative decoding (method {config.speculative_config.method}), "
            "which takes logits before vLLM reports the requests' parameters",
            "leave --speculative-config out",
        )
    if config.lora_config is not None:
        raise _refusal(
            "does not serve LoRA, whose own logits layer replaces this one",
            "leave --enable-lora out",
        )
    if config.parallel_config.pipeline_parallel_size > 1:
        raise _refusal("is not tested with pipeline stages", "use --pipeline-parallel-size 1")
    if config.load_config.load_format == "dummy":
        raise _refusal(
            "cannot check an index against weights that are not loaded",
            "leave --load-format dummy out",
        )
    processors = [str(item) for item in model.logits_processors or ()]
    installed = entry_points(group="vllm.logits_processors")
    processors += [entry.name for entry in installed if entry.name != KEY]
    if processors:
        raise _refusal(
            f"cannot know whether the logits processor {processors[0]} needs the exact logit of "
            "every token",
            "leave it out",
        )
    if model.runner_type != "generate":
        raise _refusal("serves models that generate text", "use --runner generate")
    own = (model.get_vocab_size(), model.get_hidden_size())
    if own != (manifest.vocab_size, manifest.hidden_size):
        raise UserError(
            f"the index of {manifest.model_name} is for {manifest.vocab_size} tokens of hidden "
            f"size {manifest.hidden_size}, but {model.model} has {own[0]} of {own[1]}: build an "
            "index for this model with launch/build_index.py"
        )


def _refusal(reason: str, remedy: str) -> UserError:
    return UserError(f"FlashHead {reason}: {remedy}, or start without the flashhead option")
