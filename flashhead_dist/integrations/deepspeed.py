"""DeepSpeed-Inference under our heads: its communication, logged, and its tensor parallelism.

DeepSpeed's shared-memory operator (`deepspeed_shm_comm`, CPU only) stays off: it ignores the group
of a collective, sums where a maximum is asked for, and leaves int64 unreduced (DeepSpeed 0.19.8).

The head is removed *before* `init_inference`: AutoTP shards every `nn.Linear` it recognises, an
`lm_head` along its hidden size (`LmHeadLinearAllreduce`, full logits on the wire), and leaves other
modules as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashhead_dist.errors import UserError
from flashhead_dist.models.quantized import unpack_linears

HEAD_PREFIX = "head"


def import_deepspeed() -> Any:
    """The deepspeed package, silent and ready for an open process group.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    if not torch.cuda.is_available():
        # DeepSpeed finds the CPU by itself, and warns that it did.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with redirect_stdout(StringIO()):
            import deepspeed
    except ImportError as error:
        raise UserError(
            f"DeepSpeed cannot be imported ({error}): pip install -e '.[deepspeed]', or "
            "use --tp-size 1 --pp-size 1"
        ) from error
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if dist.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed


class DeepSpeedCalls:
    """Collectives by `deepspeed.comm`, logged under names that start with `prefix`."""

    def __init__(self, prefix: str = HEAD_PREFIX) -> None:
        self._comm = import_deepspeed().comm
        self._prefix = prefix

    def all_reduce(
        self, tensor: Tensor, reduction: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
    ) -> None:
        # deepspeed takes its own enumeration or a torch ReduceOp object, not torch's RedOpType.
        self._comm.all_reduce(
            tensor, op=dist.ReduceOp(reduction), group=group, log_name=f"{self._prefix}_all_reduce"
        )

    def all_gather(self, gathered: Tensor, tensor: Tensor, group: dist.ProcessGroup | None) -> None:
        # DeepSpeed itself would only log that it gathers nothing.
        if not self._comm.has_all_gather_into_tensor():
            raise UserError(
                f"this DeepSpeed cannot gather with torch {torch.__version__}: update deepspeed, "
                "or install an older torch"
            )
        self._comm.all_gather_into_tensor(
            gathered, tensor, group=group, log_name=f"{self._prefix}_all_gather"
        )


@dataclass(frozen=True)
class LoggedCollective:
    """Calls of one kind and size, as DeepSpeed's communication log counted them."""

    name: str
    message_bytes: int
    num_calls: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all these calls."""
        return self.message_bytes * self.num_calls


@contextmanager
def communication_log() -> Iterator[list[LoggedCollective]]:
    """Log the collectives of deepspeed.comm inside the block; the list is filled at its end."""
    comm = import_deepspeed().comm
    logger = comm.comm.comms_logger
    found: list[LoggedCollective] = []
    logger.comms_dict = {}
    comm.configure(enabled=True, prof_all=True, verbose=False)
    try:
        yield found
    finally:
        comm.configure(enabled=False)
        for name, sizes in logger.comms_dict.items():
            found += [LoggedCollective(name, size, entry[0]) for size, entry in sizes.items()]


class NoHead(nn.Module):
    """In the place of a model's head, which is never called."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        raise RuntimeError("this model has no head: call its decoder and a head of heads/")


def drop_head(model: Any) -> None:
    """Remove the output head of a transformers causal LM, and the weights that nothing else uses.

    Raises:
        UserError: the model has no linear output head.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"{type(model).__name__} has no linear output head to replace (found "
            f"{type(head).__name__}): use a causal language model"
        )
    model.set_output_embeddings(NoHead())


class _Mpu:
    """What DeepSpeed asks of a model-parallel unit."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._group

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._group)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._group)


def shard_body(model: Any, group: dist.ProcessGroup | None, dtype: torch.dtype) -> Any:
    """Shard a transformers model's linear layers over `group` in place; returns the model.

    Every rank of the world must call it at once, after `drop_head`: a head that is still an
    `nn.Linear` becomes DeepSpeed's hidden-sharded one. Ranks beyond the number of key-value heads
    hold no attention, only their part of the MLPs.

    Raises:
        UserError: no DeepSpeed, or a model that it cannot shard over so many ranks.
    """
    deepspeed = import_deepspeed()
    if group is None or dist.get_world_size(group) == 1:
        return model
    # AutoTP would not shard packed layers, but would still sum their outputs over the ranks.
    unpack_linears(model, dtype)
    tp_size = dist.get_world_size(group)
    parallel = {"tp_size": tp_size, "mpu": _Mpu(group), "tp_group": group}
    try:
        # DeepSpeed prints the layers that it found.
        with redirect_stdout(StringIO()):
            engine = deepspeed.init_inference(
                model, tensor_parallel=parallel, dtype=dtype, replace_with_kernel_inject=False
            )
    except (AssertionError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"DeepSpeed cannot shard {type(model).__name__} over {tp_size} ranks ({error}): choose "
            "another --tp-size"
        ) from error
    return engine.module
