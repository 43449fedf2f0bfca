"""Greedy steps of heads through Triton's real compiler: prints what was compiled and launched.

    TRITON_INTERPRET=0 python compile_heads.py MODEL INDEX LAUNCHES BATCH...

On cuda:1 of two simulated GPUs, while cuda:0 is the current device. No kernel runs: a stub stands
for the driver.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from flashhead_dist.heads.registry import HeadBuilder
from flashhead_dist.models import open_model
from flashhead_dist.parallel import TensorParallel
from flashhead_kernels import launch_choice

sys.path.append(str(Path(__file__).parents[2] / "kernels"))

from simulated_cuda import simulated_cuda, stub_driver


def main(model_dir: str, index: str, launches: int, batch_sizes: list[int]) -> None:
    """Print JSON: compilations by kernel, the (kernel, current device) of each launch, and bytes
    that stay allocated after all batch sizes, and after the largest alone on the other device.
    """
    launch_choice.table.choose = lambda *_: launches  # type: ignore[method-assign]
    model = open_model(model_dir)

    def held_bytes(device: str, sizes: list[int]) -> int:
        """What greedy steps of these batch sizes leave allocated beside the weights."""
        builder = HeadBuilder(
            tp=TensorParallel.single(device), model=model, index_dir=Path(index), device=device
        )
        heads = [builder.build(name) for name in ("flashhead", "dense_local_max")]
        before = torch.cuda.memory_allocated(device)
        for head in heads:
            for size in sizes:
                head(torch.ones(size, model.hidden_size, dtype=torch.bfloat16, device=device))
        return torch.cuda.memory_allocated(device) - before

    with simulated_cuda(num_devices=2, interpret=False), stub_driver() as driver:
        held = [held_bytes("cuda:1", batch_sizes), 0]
        launched = sorted({(launch.kernel, launch.current_device) for launch in driver.launches})
        found = {"compilations": dict(driver.compilations), "launched": launched}
        held[1] = held_bytes("cuda:0", [max(batch_sizes)])
    print(json.dumps(found | {"held_bytes": held}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), [int(size) for size in sys.argv[4:]])
