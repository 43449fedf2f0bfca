"""A small model with an index, and one engine of vLLM in a process of its own.

Run as a script, this file is that process.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VOCAB, HIDDEN, GROUPS, CLUSTER = 1013, 128, 8, 4
ALL_CLUSTERS = 256


def make(folder: Path, index: Path, seed: int = 0, *, tied: bool = False) -> None:
    """Write a model to `folder` and its index to `index`."""
    _run("make", {"folder": str(folder), "index": str(index), "seed": seed, "tied": tied})


def answers(
    folder: Path,
    requests: Sequence[Mapping[str, Any]],
    flashhead: Any = None,
    *,
    installed: bool = True,
    engine: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What an engine of its own says: `outputs`, a list for each request, and its `counters`.

    requests: `prompts` (lists of token ids) and parameters of vLLM's `SamplingParams`. flashhead:
    what stands in the additional config. installed: whether vLLM finds the plugin at all.

    Raises:
        RuntimeError: with what the engine wrote, where it did not start.
    """
    asked = {
        "folder": str(folder),
        "requests": list(requests),
        "flashhead": flashhead,
        "installed": installed,
        "engine": dict(engine or {}),
    }
    found: dict[str, Any] = json.loads(_run("answer", asked).splitlines()[-1])
    return found


def _run(task: str, asked: Mapping[str, Any]) -> str:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, __file__, task, json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{done.stdout}\n{done.stderr}")
    return done.stdout


def _make(asked: Mapping[str, Any]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from flashhead_dist.index import IndexOptions, build_index
    from flashhead_dist.models import open_model

    torch.manual_seed(asked["seed"])
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=64, max_position_embeddings=256,
        tie_word_embeddings=asked["tied"], bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.25)
    model.save_pretrained(asked["folder"])
    options = IndexOptions(num_groups=GROUPS, cluster_size=CLUSTER, num_probes=64, alpha=0.5)
    build_index(
        open_model(asked["folder"]), options,
        calibration=None, test=None, out=Path(asked["index"]), progress=False,
    )  # fmt: skip


def _answer(asked: Mapping[str, Any]) -> None:
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
    {"make": _make, "answer": _answer}[sys.argv[1]](json.loads(sys.argv[2]))
