"""What FlashHead does not serve in vLLM: refused at start, with a reason, rather than be wrong."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from flashhead_dist.errors import UserError
from flashhead_dist.integrations.vllm.versions import unsupported

if TYPE_CHECKING:
    from flashhead_dist.index import IndexManifest

PROCESSOR_GROUP = "vllm.logits_processors"
PROCESSOR_NAME = "flashhead"
_OFF = "or start without the flashhead option"


def refuse(vllm_config: Any, manifest: IndexManifest, vllm_version: str) -> None:
    """Check a configuration of vLLM against what the plugin does and an index.

    Raises:
        UserError: the first thing that FlashHead does not serve.
    """
    sentence = unsupported(vllm_version)
    if sentence is not None:
        raise UserError(sentence)
    _refuse_features(vllm_config)
    _refuse_processors(vllm_config)
    _refuse_model(vllm_config, manifest)


def _refuse_features(config: Any) -> None:
    if config.use_v2_model_runner:
        raise UserError(
            "FlashHead needs vLLM's V1 model runner, which says before a step what each request "
            f"asks for: set VLLM_USE_V2_MODEL_RUNNER=0, {_OFF}"
        )
    if config.speculative_config is not None:
        raise UserError(
            f"FlashHead does not serve speculative decoding (method "
            f"{config.speculative_config.method}): vLLM then says nothing of what a request asks "
            f"for before it takes logits; leave --speculative-config out, {_OFF}"
        )
    if config.lora_config is not None:
        raise UserError(
            "FlashHead does not serve LoRA, whose own logits layer takes the place of this one: "
            f"leave --enable-lora out, {_OFF}"
        )
    if config.parallel_config.pipeline_parallel_size > 1:
        raise UserError(
            "FlashHead is not tested with pipeline stages: use --pipeline-parallel-size 1, " + _OFF
        )
    if config.load_config.load_format == "dummy":
        raise UserError(
            "FlashHead cannot check an index against weights that are not loaded: leave "
            f"--load-format dummy out, {_OFF}"
        )


def _refuse_processors(config: Any) -> None:
    """Other processors may read logits that are estimated here."""
    others = [str(item) for item in config.model_config.logits_processors or ()]
    others += [
        entry.name for entry in entry_points(group=PROCESSOR_GROUP) if entry.name != PROCESSOR_NAME
    ]
    if others:
        raise UserError(
            f"FlashHead cannot tell whether the logits processor {others[0]} needs the exact logit "
            f"of every token: leave it out, {_OFF}"
        )


def _refuse_model(config: Any, manifest: IndexManifest) -> None:
    model = config.model_config
    if model.runner_type != "generate":
        raise UserError(
            f"FlashHead serves models that generate text: use --runner generate, {_OFF}"
        )
    own = (model.get_vocab_size(), model.get_hidden_size())
    if own != (manifest.vocab_size, manifest.hidden_size):
        raise UserError(
            f"the index of {manifest.model_name} is for {manifest.vocab_size} tokens of hidden "
            f"size {manifest.hidden_size}, but {model.model} has {own[0]} of {own[1]}: build an "
            "index for this model with launch/build_index.py"
        )
