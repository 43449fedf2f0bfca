"""DeepSpeed's communication: opened without its shared-memory operator, logged for head and body.

The operator (`deepspeed_shm_comm`, CPU only) ignores the group of a collective, sums where a
maximum is asked for, and leaves int64 unreduced (DeepSpeed 0.19.8).
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
from torch import Tensor

from flashhead_dist.errors import UserError

HEAD_PREFIX = "head"


def import_deepspeed() -> Any:
    """The deepspeed package, quiet and ready for an open process group.

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
            f"DeepSpeed cannot be imported ({error}): pip install 'flashhead-dist[deepspeed]', or "
            "use --tp-size 1 --pp-size 1"
        ) from error
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if dist.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed


class DeepSpeedCalls:
    """Collectives by `deepspeed.comm`, whose log then counts them under a name of their own."""

    def __init__(self, prefix: str = HEAD_PREFIX) -> None:
        """prefix: what their names in the log begin with."""
        self._comm = import_deepspeed().comm
        self._prefix = prefix

    def all_reduce(
        self, tensor: Tensor, reduction: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
    ) -> None:
        # deepspeed knows its own enumeration and a torch ReduceOp object, not torch's RedOpType.
        self._comm.all_reduce(
            tensor, op=dist.ReduceOp(reduction), group=group, log_name=f"{self._prefix}_all_reduce"
        )

    def all_gather(self, gathered: Tensor, tensor: Tensor, group: dist.ProcessGroup | None) -> None:
        # DeepSpeed would only log that it gathers nothing.
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
    """Log what deepspeed.comm carries meanwhile; the list is filled at the end."""
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
