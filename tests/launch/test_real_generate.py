"""Gemma-3-270M in float32, 64 tokens from each of 20 prompts, on every layout of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flashhead_dist.decode.prompts import builtin_prompts
from flashhead_dist.models import open_model
from tests.launch.ground import LAUNCH

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(3600)]
LAYOUTS = [(1, 1), (1, 2), (2, 1), (1, 4), (2, 2)]
DENSE, RETRIEVAL, LOSSLESS = "dense_local_max", "flashhead", "flashhead --lossless 16"


@pytest.fixture(scope="module")
def unsharded() -> list[str]:
    """What transformers' own greedy generate writes."""
    model, tokenizer = open_model(None).load_body(torch.float32)
    texts = []
    for prompt in builtin_prompts():
        ids = torch.tensor([tokenizer(prompt).input_ids])
        with torch.inference_mode():
            output = model.generate(ids, max_new_tokens=64, do_sample=False)
        texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.fixture(scope="module")
def written() -> dict[tuple[int, int], dict[str, Any]]:
    """The document of each layout `(pp_size, tp_size)` that has run."""
    return {}


def run_layout(pp_size: int, tp_size: int, folder: Path) -> dict[str, Any]:
    ranks = pp_size * tp_size
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    options = ["--pp-size", str(pp_size), "--tp-size", str(tp_size), "--compare", "--json"]
    options += ["--lossless", "16", "--max-new-tokens", "64"]
    with (folder / "out").open("w") as out:
        subprocess.run(
            [sys.executable, *start, str(LAUNCH / "generate.py"), *options],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=out,
            check=True,
        )
    document: dict[str, Any] = json.loads((folder / "out").read_text().splitlines()[-1])
    return document


@pytest.mark.parametrize(("pp_size", "tp_size"), LAYOUTS)
def test_every_layout_writes_the_same(
    pp_size: int,
    tp_size: int,
    unsharded: list[str],
    written: dict[tuple[int, int], dict[str, Any]],
    tmp_path: Path,
) -> None:
    found = run_layout(pp_size, tp_size, tmp_path)
    written[pp_size, tp_size] = found
    assert len(unsharded) == 20
    assert found["texts"][DENSE] == unsharded
    assert found["texts"][LOSSLESS] == unsharded
    first = written.setdefault(LAYOUTS[0], found)
    assert found["texts"][RETRIEVAL] == first["texts"][RETRIEVAL]
