"""kernels/step_model.py: one command, labelled as a model, that follows what is launched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parents[2] / "kernels" / "step_model.py"


def run(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--models", "gemma-3-270m", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.timeout(600)
def test_the_model_is_labelled_and_its_parts_add_up() -> None:
    document = json.loads(run("--tp-sizes", "1", "8", "--json"))
    assert document["label"].startswith("MODEL")
    one, eight = document["steps"]
    # Bytes by hand: see test_bytes_of_gemma_at_tp_8_by_hand; scores are read again by candidates.
    assert eight["MB"] == pytest.approx((4_154_688 + 4 * 16 * 512) / 1e6)
    bandwidth = document["gpu"]["bandwidth_gb_per_s"]
    for step in (one, eight):
        kernels: dict[str, list[dict[str, Any]]] = step["kernels"]
        for way, us in (("two_launches", step["two launches us"]), ("dense", step["dense us"])):
            parts = ("stream_us", "barriers_us", "arrival_us", "start_us")
            assert us == pytest.approx(sum(k[part] for k in kernels[way] for part in parts))
        assert step["total us"] <= step["two launches us"]
        assert step["dense / total"] == pytest.approx(step["dense us"] / step["total us"])
        (dense,) = kernels["dense"]
        assert dense["stream_us"] > dense["read_bytes"] / bandwidth / 1e3
        # Only kernels whose programs meet pay for it.
        assert [k["arrival_us"] > 0 for k in kernels["two_launches"]][-1]
        assert kernels["two_launches"][-2]["arrival_us"] == 0
    # An eighth of the bytes, and every SM of it still in use by a dense head.
    assert (
        one["kernels"]["dense"][0]["read_bytes"] > 7.9 * eight["kernels"]["dense"][0]["read_bytes"]
    )
    text = run("--tp-sizes", "8", "--device", "l40")
    assert text.startswith("MODEL, not a measurement: L40")
