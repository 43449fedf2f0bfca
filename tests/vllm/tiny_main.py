"""One engine of vLLM in this process: answers the requests of its argument; see `tiny.answers`."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from typing import Any


def main() -> None:
    asked = json.loads(sys.argv[1])
    if not asked["installed"]:
        _hide_plugin()
    from vllm import LLM, SamplingParams

    config = {} if asked["flashhead"] is None else {"flashhead": asked["flashhead"]}
    usual_engine = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_logprobs": 2000,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    llm = LLM(asked["folder"], additional_config=config, **{**usual_engine, **asked["engine"]})
    outputs = []
    for request in asked["requests"]:
        parameters = dict(request)
        if "logit_bias" in parameters:  # JSON has texts for keys
            parameters["logit_bias"] = {int(k): v for k, v in parameters["logit_bias"].items()}
        prompts = [{"prompt_token_ids": ids} for ids in parameters.pop("prompts")]
        each = parameters.pop("each", None)
        usual = {"max_tokens": 12, "ignore_eos": True, "detokenize": False}
        sampling: Any = SamplingParams(**{**usual, **parameters})
        if each is not None:
            sampling = [SamplingParams(**{**usual, **one}) for one in each]
        found = llm.generate(prompts, sampling, use_tqdm=False)
        outputs.append([_plain(output) for output in found])
    counters = {}
    for metric in llm.get_metrics():
        if "flashhead" in metric.name:
            labels = ",".join(metric.labels.values())
            name = metric.name.removeprefix("vllm:flashhead_")
            counters[f"{name}:{labels}" if labels else name] = metric.value
    print(json.dumps({"outputs": outputs, "counters": counters, "head": _head(llm)}))


def _plain(output: Any) -> dict[str, Any]:
    return {
        "token_ids": [list(one.token_ids) for one in output.outputs],
        "logprobs": [
            [
                sorted((token, entry.logprob) for token, entry in place.items())
                for place in one.logprobs
            ]
            for one in output.outputs
            if one.logprobs is not None
        ],
        "prompt_logprobs": [
            sorted((token, entry.logprob) for token, entry in place.items())
            for place in output.prompt_logprobs or []
            if place is not None
        ],
    }


def _head(llm: Any) -> dict[str, Any]:
    """The classes that serve the output head, and the bytes that its weights take."""
    worker = llm.llm_engine.model_executor.driver_worker.worker
    model = worker.model_runner.model
    layers = {"lm_head": model.lm_head, "logits_processor": model.logits_processor}
    classes = {
        name: f"{type(layer).__module__}.{type(layer).__qualname__}"
        for name, layer in {**layers, "embed_tokens": model.model.embed_tokens}.items()
    }
    return {**classes, "rows": len(model.lm_head.weight)}


def _hide_plugin() -> None:
    whole = importlib.metadata.entry_points

    def without(**wanted: Any) -> Any:
        found = whole(**wanted)
        if not wanted:  # by group, which nothing of vLLM asks for
            return found
        return type(found)(entry for entry in found if entry.name != "flashhead")

    importlib.metadata.entry_points = without


if __name__ == "__main__":
    main()
