"""Decoding over DeepSpeed pipeline stages, each of them a tensor-parallel group.

DeepSpeed gives `PipelineModule`, the grid of ranks, its communication calls, and automatic tensor
parallelism of each stage; its pipeline engine knows neither KV caches nor a way back for tokens,
so the loop is ours (`pipeline_loop`).

Ranks: stage s, tensor-parallel rank t is global rank `s * tp_size + t`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from flashhead_dist.bench.memory import release_memory
from flashhead_dist.decode.loop import Choose, DecodeTimes
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.errors import UserError
from flashhead_dist.integrations.deepspeed_comm import DeepSpeedCalls, import_deepspeed
from flashhead_dist.integrations.pipeline_bubble import StageTimes
from flashhead_dist.integrations.pipeline_links import Links
from flashhead_dist.integrations.pipeline_loop import StageLoop
from flashhead_dist.integrations.pipeline_stage import PipelineStage
from flashhead_dist.parallel import TensorParallel


@dataclass(frozen=True)
class PipelineTimes:
    """What one run took. Seconds.

    micro_batches: of each state, by this rank's clock. stages: of each stage, by the clock of the
    rank with this one's tensor-parallel rank. wait_s in them includes transfers.
    """

    micro_batches: list[DecodeTimes]
    stages: list[StageTimes]


class PipelineDecoder:
    """One rank of `pp_size x tp_size` that decode with a model cut into stages.

    tp: this rank's place in the tensor-parallel group of its stage. On the last stage (`is_last`)
    it is what to shard the head over.
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

        load_model: gives a causal LM of its own, in eval mode, on the CPU and in the dtype to run
            in; it is called once, and all but this rank's part is dropped when it returns.
        layers_per_stage: as even as can be where None.

        Raises:
            UserError: sizes that do not fit the ranks or the model, a model of an unsupported
                kind, DeepSpeed missing.
        """
        _check_sizes(pp_size, tp_size)
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
        self._pipe = TensorParallel(
            tp_rank=self.stage, tp_size=pp_size, group=grid.get_pipe_parallel_group()
        )
        """The stages, for what they tell each other outside the loop."""
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
    ) -> PipelineTimes:
        """Decode every state to its end, each a micro-batch in flight; every rank calls it alike.

        states: equal on every rank, which all advance them alike.
        choose, confirm: as in `decode.loop.decode`; used on the last stage alone.
        on_step: called with a state's place when its tokens may have been released.
        flushed: finish each step of all micro-batches before the next begins, as DeepSpeed's
            `eval_batch` would: slower, to measure against.
        """
        loop = StageLoop(
            self._stage,
            self._module,
            self._links,
            self.device,
            choose=choose,
            confirm=confirm,
            on_step=on_step,
        )
        self._pipe.barrier()
        with torch.inference_mode():
            micro_batches = loop.run(states, flushed=flushed)
        return PipelineTimes(micro_batches, self._pipe.gather_objects(loop.times))


def _check_sizes(pp_size: int, tp_size: int) -> None:
    if pp_size < 2:
        raise UserError(f"a pipeline needs 2 stages or more, got pp_size {pp_size}: leave it out")
    if tp_size < 1:
        raise UserError(f"tp_size must be at least 1, got {tp_size}")
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks != pp_size * tp_size:
        raise UserError(
            f"pp_size {pp_size} x tp_size {tp_size} needs {pp_size * tp_size} ranks, but {ranks} "
            f"started: use --nproc-per-node {pp_size * tp_size} or other sizes"
        )
