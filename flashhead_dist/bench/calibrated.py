"""A system file's contents from what was measured on the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flashhead_dist.bench.setup import Setup
from flashhead_topology.fit import Fit
from flashhead_topology.systems import Level, Source, System


def calibrated_system(
    setup: Setup,
    fits: Sequence[Fit],
    memory: tuple[float, str, float],
    *,
    name: str,
    algorithm: str | None,
    ranks: int,
    made: str,
) -> System:
    """The machine as the cost model knows it, every figure with its source.

    Args:
        fits: of its levels, innermost first.
        memory: bytes a second of one rank, how that was measured, seconds of a launch.
        algorithm: of its collectives; see `System`.
        ranks: that the outermost level joins.
        made: by what command, on what and when.

    Raises:
        ValueError: a name that cannot be one.
    """
    bytes_per_s, method, launch_s = memory
    levels = [_with_sources(fit, made) for fit in fits]
    levels[-1] = replace(levels[-1], ranks=ranks)
    return System(
        name=name,
        device=setup.device_name,
        device_type="cuda" if setup.device.type == "cuda" else "cpu",
        description=f"Calibrated by {made}.",
        memory_bandwidth_bytes_per_s=bytes_per_s,
        launch_s=launch_s,
        levels=tuple(levels),
        algorithm=algorithm,
        sources={
            "memory_bandwidth_bytes_per_s": Source("measured", made, method),
            "launch_s": Source("measured", made, "the least of bursts of one-element additions"),
        },
    )


def _with_sources(fit: Fit, made: str) -> Level:
    note = f"one fit of all constants to {len(fit.residuals)} collectives"
    source = Source("measured", made, note, round(fit.mean_relative_error(), 4))
    figures = ["alpha_s", "beta_s_per_byte", "base_s"]
    if fit.level.one_shot_alpha_s is not None:
        figures.append("one_shot_alpha_s")
    return replace(fit.level, sources=dict.fromkeys(figures, source))
