"""What the ranks' GPUs counted of links and memory in a step, beside what it should move."""

from __future__ import annotations

from flashhead_dist.report.runs import Run
from flashhead_dist.report.section import Section, frame_of

KEY = "device_counts"


def device_counts_section(run: Run) -> Section:
    """NVLink, PCIe and memory by NVML; a counter that is missing is named with its reason."""
    title = "Bytes that GPUs counted"
    rows = [
        {
            "batch_size": record.batch_size,
            "tp_size": record.tp_size,
            "head": record.head,
            "counter": count.name,
            "counted_bytes_per_step": count.bytes_per_step,
            "analytic_bytes_per_step": count.analytic_bytes_per_step,
        }
        for record in run.records
        for count in record.device_counts
        if count.bytes_per_step is not None
    ]
    reasons = {
        f"{count.name} is missing, because {count.reason}."
        for record in run.records
        for count in record.device_counts
        if count.bytes_per_step is None
    }
    if not rows:
        whole = {r.device_counts_reason for r in run.records if r.device_counts_reason}
        return Section(
            key=KEY,
            title=title,
            notes=tuple(sorted(reasons)),
            missing="; ".join(sorted(whole)) or "no GPU had any of these counters",
        )
    notes = [
        "Of one step, all ranks together, over a burst of steps; others that use the same GPU or "
        "link are counted too. Beside it what the ranks of a ring send, whichever link carries "
        "it, and for memory the weights that the step reads. Memory and the counters named gpm "
        "come from rates between two samples, the others from readings before and after.",
        *sorted(reasons),
    ]
    return Section(key=KEY, title=title, notes=tuple(notes), frame=frame_of(rows))
