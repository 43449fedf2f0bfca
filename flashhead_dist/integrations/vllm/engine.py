"""The state that the layers of one engine share in a process: options, index shard, and batch.

Also the entry point `vllm.logits_processors`, by which vLLM reports the requests of each batch.

vLLM imports this where FlashHead is off too, and on a CPU does not start once llvmlite is loaded
(`vllm.triton_utils.dispatcher` 0.32 fails): modules that need numba are imported at their first
use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
import vllm
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as V2LogitsProcessor,
)

from flashhead_dist.errors import UserError
from flashhead_dist.integrations.vllm.needs import RequestNeed, RowNeed, request_need
from flashhead_dist.integrations.vllm.options import FlashHeadOptions, options_of, refuse
from flashhead_dist.parallel import TensorParallel

if TYPE_CHECKING:
    from flashhead_dist.index import IndexManifest, LoadedShard
    from flashhead_dist.integrations.vllm.head import RowsHead


@dataclass
class Batch:
    """The requests of the step to come: needs by row, for `size` rows."""

    size: int = 0
    needs: dict[int, RequestNeed] = field(default_factory=dict)

    def rows(self) -> list[RowNeed]:
        """The rows' needs, in order."""
        return [self.needs[row].row for row in range(self.size)]

    def dense(self, num_rows: int) -> str | None:
        """Why a step of `num_rows` rows needs every logit, or None."""
        for row in range(self.size):
            need = self.needs.get(row)
            reason = "unknown_rows" if need is None else need.dense
            if reason is not None:
                return reason
        return None if num_rows == self.size else "unknown_rows"


class Engine:
    """One engine with FlashHead; `engine_of` finds it by its vLLM configuration."""

    def __init__(self, vllm_config: Any, options: FlashHeadOptions) -> None:
        """Raises UserError for a configuration or an index that does not fit."""
        from flashhead_dist.index import load_manifest

        self.options = options
        self.manifest: IndexManifest = load_manifest(options.index)
        refuse(vllm_config, self.manifest, vllm.__version__)
        layer = op_registry_oot.get(LogitsProcessor.__name__)
        if layer is None or not layer.__module__.startswith(__package__ or ""):
            raise UserError(
                "vLLM has not loaded FlashHead's layers (VLLM_PLUGINS leaves them out, or another "
                f"plugin's {layer} replaces them): let it load the plugin flashhead, or start "
                "without the flashhead option"
            )
        self.max_num_rows: int = vllm_config.scheduler_config.max_num_seqs
        self.model_name: str = vllm_config.model_config.model
        self.tied = bool(
            getattr(vllm_config.model_config.hf_text_config, "tie_word_embeddings", False)
        )
        self.batch = Batch()
        self.index: LoadedShard | None = None

    @property
    def num_candidates(self) -> int:
        """Tokens of a greedy row that are scored exactly, pads left out."""
        manifest = self.manifest
        probes = self.options.num_probes or manifest.num_probes
        per_group = -(-probes // manifest.num_groups)
        return manifest.num_groups * per_group * manifest.cluster_size

    def load(self, device: torch.device, dtype: torch.dtype) -> LoadedShard:
        """This rank's part of the index, once."""
        from flashhead_dist.index import load_shard
        from flashhead_dist.index.shard import with_row_dtype

        if self.index is None:
            group = get_tp_group()
            with torch.device("cpu"):
                loaded = load_shard(
                    self.options.index,
                    tp_rank=group.rank_in_group,
                    tp_size=group.world_size,
                    device=device,
                )
                self.index = with_row_dtype(loaded, dtype)
        return self.index

    def rows_head(self, dtype: torch.dtype | None, softcap: float | None, scale: float) -> RowsHead:
        """The head over this rank's shard; dtype, softcap and scale are those of vLLM's layer."""
        from flashhead_dist.heads.flashhead import FlashHeadAuto
        from flashhead_dist.index.shard import read_token_ids
        from flashhead_dist.integrations.vllm.head import Finish, GroupControl, RowsHead, start
        from flashhead_dist.integrations.vllm.rows import VocabularyMap

        manifest, index, options = self.manifest, self.index, self.options
        assert index is not None
        group, rows = get_tp_group(), index.shard.rows
        device = rows.device
        tp = TensorParallel.single(device)
        if group.world_size > 1:
            tp = TensorParallel.from_group(group.device_group, device)
        head = FlashHeadAuto(
            tp,
            index,
            num_probes=options.num_probes or manifest.num_probes,
            alpha=manifest.alpha if options.alpha is None else options.alpha,
        )
        token_ids, _ = read_token_ids(options.index, manifest)
        where = VocabularyMap.of(token_ids.to(device), manifest.vocab_size)
        rows_head = RowsHead(head, Finish(dtype or rows.dtype, softcap, scale), where)
        on_cpu = TensorParallel(
            tp_rank=group.rank_in_group, tp_size=group.world_size, group=group.cpu_group
        )
        start(
            rows_head, options.crossover, GroupControl(on_cpu),
            largest=self.max_num_rows, dtype=rows.dtype,
        )  # fmt: skip
        return rows_head


_ENGINES: WeakValueDictionary[str, Engine] = WeakValueDictionary()


def engine_of(vllm_config: Any) -> Engine | None:
    """The engine of a configuration, the same object for all callers; None where FlashHead is off.

    The caller must hold it: the registry holds weak references.

    Raises:
        UserError: see `Engine` and `options_of`.
    """
    options = options_of(vllm_config)
    if options is None:
        return None
    found = _ENGINES.get(vllm_config.instance_id)
    if found is None:
        found = Engine(vllm_config, options)
        _ENGINES[vllm_config.instance_id] = found
    return found


class RequestProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Keeps `Engine.batch` equal to vLLM's batch; never changes a logit.

    vLLM makes one for each engine, whether FlashHead is on or not. It has the interfaces of both
    model runners, since each refuses to start beside a processor of the other's interface.
    """

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        self.engine = engine_of(vllm_config)

    def is_argmax_invariant(self) -> bool:
        """It changes no logit."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Follow requests that came, went, or changed rows (V1 model runner, before each step)."""
        if self.engine is None or batch_update is None:
            return
        batch = self.engine.batch
        process_dict_updates(batch.needs, batch_update, self._need)
        batch.size = batch_update.batch_size

    def _need(self, parameters: Any, _: Any, output_token_ids: list[int]) -> RequestNeed:
        assert self.engine is not None
        return request_need(parameters, output_token_ids, self.engine.num_candidates)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """It modifies no request's logits (V2 model runner)."""
        return False

    def apply(self, logits: Tensor, *_: Any) -> Tensor:
        """The logits, as they are."""
        return logits
