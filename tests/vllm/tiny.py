"""A small model with an index, and one engine of vLLM in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VOCAB, HIDDEN, GROUPS, CLUSTER = 1013, 128, 8, 4
ALL_CLUSTERS = 256
ROOT = Path(__file__).parents[2]

_MAKE = """
import sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from flashhead_dist.index import IndexOptions, build_index
from flashhead_dist.models import open_model
folder, index = map(Path, sys.argv[1:3])
torch.manual_seed(int(sys.argv[3]))
config = LlamaConfig(vocab_size={vocab}, hidden_size={hidden}, intermediate_size=128,
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=64,
    max_position_embeddings=256, tie_word_embeddings=sys.argv[4] == 'tied',
    bos_token_id=1, eos_token_id=2)
model = LlamaForCausalLM(config)
torch.nn.init.normal_(model.lm_head.weight, std=0.25)
model.save_pretrained(folder)
build_index(open_model(str(folder)), IndexOptions(num_groups={groups}, cluster_size={cluster},
    num_probes=64, alpha=0.5), calibration=None, test=None, out=index, progress=False)
"""


def make(folder: Path, index: Path, seed: int = 0, *, tied: bool = False) -> None:
    """Write a model to `folder` and its index to `index`."""
    code = _MAKE.format(vocab=VOCAB, hidden=HIDDEN, groups=GROUPS, cluster=CLUSTER)
    _run(
        [
            sys.executable,
            "-c",
            code,
            str(folder),
            str(index),
            str(seed),
            "tied" if tied else "untied",
        ]
    )


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
    command = [sys.executable, str(Path(__file__).with_name("tiny_main.py")), json.dumps(asked)]
    found: dict[str, Any] = json.loads(_run(command).splitlines()[-1])
    return found


def _run(command: list[str]) -> str:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{done.stdout}\n{done.stderr}")
    return done.stdout
