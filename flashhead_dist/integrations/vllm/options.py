"""What the user asks of FlashHead in vLLM, and whether anything is asked for at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from flashhead_dist.errors import UserError

KEY = "flashhead"
"""Of vLLM's `--additional-config`, and the name of an index folder within a model's folder."""

MEASURE = "measure"
NEVER = "never"


@dataclass(frozen=True, kw_only=True)
class FlashHeadOptions:
    """`--additional-config '{"flashhead": {"index": "DIR", ...}}'`.

    Raises:
        UserError: a value outside its range.
    """

    index: Path
    """Folder that launch/build_index.py wrote for the model."""
    num_probes: int | None = None
    """Clusters probed for a greedy row; the index's own where None."""
    alpha: float | None = None
    """Weight of a cluster's spread; the index's own where None."""
    crossover: int | str = MEASURE
    """From how many rows on a batch is served by the dense path: a number, "measure" (at start,
    kept for the next one) or "never"."""

    def __post_init__(self) -> None:
        known = self.crossover in (MEASURE, NEVER)
        if not known and not (_is_int(self.crossover) and int(self.crossover) >= 1):
            raise UserError(
                f'flashhead option "crossover": {self.crossover!r} is neither a number of rows '
                f'above 0 nor "{MEASURE}" or "{NEVER}": give one of these'
            )
        if self.num_probes is not None and not _is_int(self.num_probes):
            raise UserError(
                f'flashhead option "num_probes": {self.num_probes!r} is not a whole number: give '
                "one, or leave it out for the index's own"
            )
        if self.alpha is not None and not isinstance(self.alpha, int | float):
            raise UserError(
                f'flashhead option "alpha": {self.alpha!r} is not a number: give one, or leave it '
                "out for the index's own"
            )

    @classmethod
    def parse(cls, asked: Any) -> Self:
        """The options of what stands under `KEY`: a mapping, or the index folder alone.

        Raises:
            UserError: anything else, an option that does not exist, no index.
        """
        if isinstance(asked, str | Path):
            asked = {"index": asked}
        if not isinstance(asked, Mapping):
            raise UserError(
                f'additional config "{KEY}": {asked!r} is not understood: give an index folder, or '
                f'{{"index": "DIR"}}, or false to switch FlashHead off'
            )
        names = [field.name for field in fields(cls)]
        for name in asked:
            if name not in names:
                raise UserError(
                    f"there is no flashhead option {name!r}: choose from {', '.join(names)}"
                )
        if not isinstance(asked.get("index"), str | Path):
            raise UserError(
                f'additional config "{KEY}" names no index folder: build one with '
                'launch/build_index.py and give it as {"index": "DIR"}'
            )
        return cls(**{**asked, "index": Path(asked["index"]).expanduser()})


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def options_of(vllm_config: Any) -> FlashHeadOptions | None:
    """What a vLLM configuration asks for; None where nothing does.

    Its `additional_config` goes first; else an index in the folder `flashhead` of a local model.

    Raises:
        UserError: see `FlashHeadOptions.parse`.
    """
    additional = vllm_config.additional_config
    asked = additional.get(KEY) if isinstance(additional, Mapping) else None
    if asked is False:
        return None
    if asked is not None:
        return FlashHeadOptions.parse(asked)
    if vllm_config.model_config is None:
        return None
    beside = Path(vllm_config.model_config.model) / KEY
    return FlashHeadOptions(index=beside) if beside.is_dir() else None
