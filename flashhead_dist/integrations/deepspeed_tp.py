"""DeepSpeed-Inference's automatic tensor parallelism under our head.

The head is swapped *before* `init_inference`: AutoTP shards every `nn.Linear` it recognises, an
`lm_head` along its hidden size (`LmHeadLinearAllreduce`, full logits on the wire), and leaves other
modules alone.
"""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashhead_dist.errors import UserError
from flashhead_dist.integrations.deepspeed_comm import import_deepspeed
from flashhead_dist.models.int4_linear import unpack_linears


class NoHead(nn.Module):
    """Where a model's head was: the decoder is called without it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        raise RuntimeError("this model has lost its head: call its decoder and a head of heads/")


def drop_head(model: Any) -> None:
    """Take a transformers causal LM's output head away, and the weights that nothing else uses.

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

    Every rank of the world must call it at once. A head that is to be ours must be gone by then
    (`drop_head`); one that is still an `nn.Linear` becomes DeepSpeed's hidden-sharded one. Ranks
    beyond the number of key-value heads hold no attention, only their part of the MLPs.

    Raises:
        UserError: no DeepSpeed, or a model that it cannot shard over so many ranks.
    """
    deepspeed = import_deepspeed()
    if group is None or dist.get_world_size(group) == 1:
        return model
    # AutoTP would leave packed layers whole on every rank, and sum them up all the same.
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
