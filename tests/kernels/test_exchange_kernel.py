"""The exchange kernel between processes, against its twin, on schedules that break a faulty one.

Interpreted on a CPU this shows the protocol, not the memory order of a GPU; the order of the
operations that a GPU gets is read from the code compiled for sm_90.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flashhead_kernels.keys import (
    DEFAULT_CAPACITY,
    EMPTY_KEY,
    NUM_BUFFERS,
    SIGNAL_STRIDE,
    merged_keys,
    num_words,
    pack_keys,
    padded,
    unpack_keys,
)

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "kernels"


def _run(script: str, *arguments: object, interpret: bool) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{KERNELS}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _rounds(scenario: str, tp_size: int, rounds: int, buffers: int = NUM_BUFFERS) -> dict[str, Any]:
    return _run("exchange_ranks.py", scenario, tp_size, rounds, buffers, interpret=True)


@pytest.mark.parametrize(("tp_size", "rounds"), [(2, 150), (3, 50), (4, 40), (8, 12)])
def test_every_key_of_every_round_is_right_though_ranks_stall(tp_size: int, rounds: int) -> None:
    result = _rounds("stalls", tp_size, rounds)
    assert result["keys"] >= tp_size * rounds
    assert (result["wrong"], result["hung"], result["failed"]) == (0, [], [])


@pytest.mark.parametrize("scenario", ["overtaken_reader", "overtaken_waiter"])
def test_a_rank_may_be_a_round_ahead(scenario: str) -> None:
    result = _rounds(scenario, 2, 4)
    assert (result["wrong"], result["hung"], result["failed"]) == (0, [], [])


@pytest.mark.parametrize(
    ("scenario", "tp_size", "buffers"),
    [("overtaken_reader", 2, 1), ("unawaited", 2, 2), ("waits_for_one", 3, 2)],
)
def test_these_schedules_catch_one_buffer_and_a_missing_wait(
    scenario: str, tp_size: int, buffers: int
) -> None:
    result = _rounds(scenario, tp_size, 4, buffers)
    assert (result["hung"], result["failed"]) == ([], [])
    assert result["wrong"] > 0


def _instructions(ptx: str) -> list[str]:
    code = ptx[ptx.index("ld.param") : ptx.index("ret;")]
    return [line.strip() for line in code.splitlines()]


def _places(lines: list[str], pattern: str) -> list[int]:
    return [i for i, line in enumerate(lines) if re.search(pattern, line)]


@pytest.mark.parametrize("tp_size", [2, 3, 4, 8])
def test_compiled_order_is_store_barrier_release_acquire_barrier_load(tp_size: int) -> None:
    result = _run("exchange_compiled.py", tp_size, DEFAULT_CAPACITY, interpret=False)
    usage = dict(re.findall(r"(\w+):(\d+)", result["usage"]))
    # The kernel has no array, so a stack could only hold spilled registers.
    assert (usage["STACK"], usage["LOCAL"]) == ("0", "0")
    assert int(usage["REG"]) <= 64

    # Another batch or address must not compile a kernel while a graph is captured.
    assert result["specialised"] == []

    lines = _instructions(result["ptx"])
    barriers = _places(lines, r"\bbar\.sync|\bbarrier\.sync")
    stores = _places(lines, r"\bst\.global")
    (release,) = _places(lines, r"\batom\.global\.(sys\.release|release\.sys)\.exch\.b64")
    (acquire,) = _places(lines, r"\batom\.global\.(sys\.acquire|acquire\.sys)\.add\.u64")
    loads = _places(lines, r"\bld\.volatile\.global")
    per_peer = DEFAULT_CAPACITY // 128
    sent = [i for i in stores if i < release]
    assert len(sent) == (tp_size - 1) * per_peer
    assert len(loads) == (tp_size - 1) * per_peer
    (turn,) = _places(lines, r"@%p\d+ bra")
    assert any(sent[-1] < i < release for i in barriers)
    assert release < acquire < turn
    assert any(turn < i < loads[0] for i in barriers)
    # Results and the new epoch come last: nothing of round e + 1 is published in round e.
    assert min(i for i in stores if i > release) > loads[-1]


def test_twin_is_the_argmax_over_all_ranks() -> None:
    logits = torch.tensor([[1.5, -2.0, 0.0], [1.5, -1.0, -0.0]])
    keys = pack_keys(logits, torch.tensor([[9, 0, 5], [4, 1, 6]]))
    keys[0, 1] = EMPTY_KEY
    best, ids = unpack_keys(merged_keys(keys))
    assert best.tolist() == [1.5, -1.0, 0.0]
    assert ids.tolist() == [4, 1, 5]


def test_layout_has_room_for_two_rounds_and_refuses_what_the_kernel_cannot_index() -> None:
    assert num_words(3, 8) == 3 * SIGNAL_STRIDE + 2 * 3 * 8
    assert [padded(n) for n in (1, 2, 3, 4, 5, 8)] == [1, 2, 4, 4, 8, 8]
    with pytest.raises(ValueError, match="two ranks"):
        num_words(1, 8)
    with pytest.raises(ValueError, match="power of two"):
        num_words(2, 12)


def test_keys_that_the_kernel_cannot_take_are_refused() -> None:
    from flashhead_kernels.triton_exchange import exchange_keys

    addresses, epoch = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)

    def attempt(keys: torch.Tensor, out: torch.Tensor) -> None:
        exchange_keys(keys, out, addresses, epoch, 0, 4)

    keys = torch.zeros(4, dtype=torch.int64)
    for bad in (keys.int(), keys[:0], torch.zeros(5, dtype=torch.int64), keys[::2]):
        with pytest.raises(ValueError, match="key"):
            attempt(bad, torch.empty_like(bad))
    with pytest.raises(ValueError, match="4 keys into 3"):
        attempt(keys, keys[:3])
    assert int(epoch) == 0
