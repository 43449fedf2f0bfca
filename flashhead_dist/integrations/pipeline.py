"""Decoding over DeepSpeed pipeline stages, each of them a tensor-parallel group.

DeepSpeed gives `PipelineModule`, the grid of ranks, its communication calls, and automatic tensor
parallelism of each stage; its pipeline engine knows neither KV caches nor a way back for tokens,
so the loop is ours (`pipeline_stage.StageLoop`).

Ranks: stage s, tensor-parallel rank t is global rank `s * tp_size + t`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.distributed as dist

from flashhead_dist.bench.memory import release_memory
from flashhead_dist.decode.loop import Choose, DecodeTimes
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.errors import UserError
from flashhead_dist.integrations.deepspeed import DeepSpeedCalls, import_deepspeed
from flashhead_dist.integrations.pipeline_bubble import StageTimes
from flashhead_dist.integrations.pipeline_stage import Links, PipelineStage, StageLoop
from flashhead_dist.parallel import TensorParallel


class PipelineDecoder:
    """One rank of `pp_size x tp_size` that decode with a model cut into stages.

    tp: this rank's place in the tensor-parallel group of its stage. On the last stage (`is_last`)
    the head is sharded over it.
    """

    def __init__(
        self,
        load_model: Callable[[], Any],
        *,
        pp_size: int,
        tp_size: int = 1,
        layers_per_stage: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Every rank of the open process group calls it.

        load_model: returns a causal LM in eval mode, on the CPU and in the dtype to run in; called
            once, and all but this rank's part is dropped.
        layers_per_stage: an even split where None.

        Raises:
            UserError: sizes that do not fit the ranks or the model, a model of an unsupported
                kind, DeepSpeed missing.
        """
        if pp_size < 2:
            raise UserError(
                f"a pipeline needs 2 stages or more, got pp_size {pp_size}: leave it out"
            )
        if tp_size < 1:
            raise UserError(f"tp_size must be at least 1, got {tp_size}")
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks != pp_size * tp_size:
            raise UserError(
                f"pp_size {pp_size} x tp_size {tp_size} needs {pp_size * tp_size} ranks, but "
                f"{ranks} started: use --nproc-per-node {pp_size * tp_size} or other sizes"
            )
        self.device = torch.device(device)
        self.pp_size = pp_size
        import_deepspeed()
        # PipelineModule reads it; torchrun sets it.
        os.environ.setdefault("LOCAL_RANK", "0")
        from deepspeed.pipe import LayerSpec, PipelineModule
        from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

        specs = [
            LayerSpec(PipelineStage, load_model, stage, pp_size, layers_per_stage)
            for stage in range(pp_size)
        ]
        topology = PipeModelDataParallelTopology(num_pp=pp_size, num_mp=tp_size, num_dp=1)
        with redirect_stdout(io.StringIO()):
            self._module = PipelineModule(
                layers=specs, topology=topology, partition_method="uniform", dynamic_shape=True
            )
        grid = self._module.mpu()
        self._stage: PipelineStage = self._module.forward_funcs[0]
        self.stage: int = grid.get_stage_id()
        self.is_last = self._stage.is_last
        self.tp = TensorParallel.single(self.device)
        if tp_size > 1:
            # Not grid.get_model_parallel_group(): that is all stages of a pipeline.
            group = grid.get_slice_parallel_group()
            self.tp = TensorParallel.from_group(group, self.device, calls=DeepSpeedCalls())
            self._stage.shard(group)
        self._module.to(self.device)
        release_memory(torch.device("cpu"))
        group = grid.get_pipe_parallel_group()
        self._stages = TensorParallel(tp_rank=self.stage, tp_size=pp_size, group=group)
        self._links = Links(grid, self.device)

    @property
    def num_layers(self) -> int:
        """Layers of this rank's stage."""
        return self._stage.stop - self._stage.start

    def decode(
        self,
        states: Sequence[DecodeState],
        choose: Choose | None = None,
        *,
        confirm: Choose | None = None,
        on_step: Callable[[int], None] | None = None,
        flushed: bool = False,
    ) -> tuple[list[DecodeTimes], list[StageTimes]]:
        """Decode every state to its end, each a micro-batch in flight; every rank calls it alike.

        Returns times of each state by this rank's clock, and times of each stage by the clock of
        its rank with the same tensor-parallel rank.

        states: equal on every rank. choose, confirm, on_step: of `StageLoop`.
        flushed: finish each step of all micro-batches before the next begins, as DeepSpeed's
            `eval_batch` would: slower, for comparison.
        """
        loop = StageLoop(
            self._stage, self._module, self._links, self.device,
            choose=choose, confirm=confirm, on_step=on_step,
        )  # fmt: skip
        self._stages.barrier()
        with torch.inference_mode():
            times = loop.run(states, flushed=flushed)
        return times, self._stages.gather_objects(loop.times)
