"""The command `tasks` of evaluate.py: a head's answers to GSM8K, MATH-500 and other tasks, compared
with the dense head's."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.table import Table
from tyro.conf import arg

from flashhead_dist.bench.environment import software_versions
from flashhead_dist.decode.answers import AskOptions, answer_batch, batches
from flashhead_dist.decode.engine import DENSE, Engine, Layout, Variant
from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.tasks import TASK_NAMES, Item, Task, find_tasks, read_items
from flashhead_dist.evaluate.tasks.records import TaskRun, summarise
from flashhead_dist.heads.registry import HEADS, named_head
from flashhead_dist.heads.sampling import SamplingParameters
from flashhead_dist.index import load_manifest
from flashhead_dist.progress import progress
from flashhead_dist.report.tasks import task_notes, task_tables
from flashhead_topology.probe import probe_machine
from options import (
    DTYPES,
    Checked,
    Device,
    DType,
    Folder,
    IndexedModel,
    JsonOutput,
    NonNegative,
    Positive,
    Switch,
    available_device,
)


@dataclass(kw_only=True)
class _Questions(Checked):
    """What to answer."""

    data: Folder[Path]
    """the data sets: a folder a task with one .jsonl file"""
    tasks: Annotated[str, arg(metavar="A,B")] = ",".join(TASK_NAMES)
    """tasks"""
    limit: Positive[int | None] = None
    """items of each task (default: all)"""
    max_new_tokens: Positive[int | None] = None
    """tokens of an answer (default: 256, as the tasks say)"""
    chat: Switch = False
    """ask through the model's chat template"""


@dataclass(kw_only=True)
class _Heads(Checked):
    """What answers."""

    head: Annotated[str, arg(metavar="NAME[:PROBES][@DIR],...")] = "flashhead"
    """heads, each with its number of probes and an index folder where they are not those below"""
    lossless: NonNegative[int] = 0
    """each head once more, its last N tokens checked by one dense pass"""
    num_probes: Positive[int | None] = None
    """clusters probed (default: the index's)"""
    dtype: DType[str] = "fp32"
    """of the model"""
    device: Device[str | None] = None
    """default: cuda where there is one"""
    batch_size: Positive[int] = 8
    """items at once"""

    def variants(self) -> list[Variant]:
        """The dense head and every other; raises UserError for a head that is not one."""
        heads = [named_head(text) for text in self.head.split(",") if text]
        if not heads:
            raise UserError(f"--head names none: choose from {', '.join(HEADS)}")
        checked = [0, self.lossless] if self.lossless else [0]
        own = [Variant(h.name, n, h.num_probes, h.index) for h in heads for n in checked]
        return list(dict.fromkeys([Variant(DENSE), *own]))


@dataclass(kw_only=True)
class _RunOutput(JsonOutput):
    """What to write."""

    out: Folder[Path] = Path("runs/tasks")
    """records"""


@dataclass(kw_only=True)
class TasksCommand:
    """Answers of heads to tasks, compared with the dense head's.

    Decodes every item with the dense head (dense_local_max) and with --head, in batches that take
    turns, and writes a record an item: prompts, both answers, the final answers, token counts. The
    same command again continues an interrupted run; a higher --limit adds items.

    docs/guides/evaluation.md says where each data set is published and what its lines hold. Items
    of the shipped corpus, on which default indexes are calibrated, are left out. ifeval needs
    lm-eval: pip install -e '.[lm-eval]'.

    evaluate.py tasks --data DIR --tasks gsm8k --limit 50

    evaluate.py tasks --data DIR --head flashhead,flashhead_escalate,flashhead_global@PUBLISHED

    evaluate.py tasks --data DIR --model MODEL --chat --head flashhead --lossless 16
    """

    source: IndexedModel
    questions: _Questions
    heads: _Heads
    output: _RunOutput

    def run(self) -> dict[str, Any]:
        """Answer what is not answered yet; returns the document of all records."""
        questions, heads = self.questions, self.heads
        variants = heads.variants()
        device = available_device(heads.device)
        if self.source.index is not None:
            load_manifest(self.source.index)
        tasks = find_tasks(questions.tasks)
        for task in tasks:
            task.require()
        read = {task: read_items(task, questions.data) for task in tasks}
        items = {task: found[: questions.limit] for task, (found, _) in read.items()}
        model = self.source.open()
        index = self.source.index_folder(model, [v.head for v in variants if v.index is None])
        options = AskOptions(heads.batch_size, questions.max_new_tokens, questions.chat)
        named = [v.index for v in variants if v.index is not None]
        settings = {
            "model": model.name,
            "weight_hash": model.weight_hash,
            "index_hash": None if index is None else load_manifest(index).index_hash,
            "head": heads.head,
            "lossless": heads.lossless,
            "num_probes": heads.num_probes,
            "dtype": heads.dtype,
            "device": device.type,
            **asdict(options),
        }
        if named:
            hashes = {str(folder): load_manifest(folder).index_hash for folder in named}
            settings["named_index_hashes"] = hashes
        record = TaskRun(self.output.out, settings, _environment())
        engine = Engine(
            model=model,
            index_dir=index,
            variants=variants,
            layout=Layout(),
            dtype=DTYPES[heads.dtype],
            device=device,
            parameters=SamplingParameters(),
            num_probes=heads.num_probes,
        )
        try:
            _answer(record, engine, variants, items, options)
        except KeyboardInterrupt:
            finished = f"{len(record.finished)} items are saved in {record.folder}"
            print(f"\n{finished}: the same command continues from there", file=sys.stderr)
            raise
        wanted = {(item.task, item.id) for own in items.values() for item in own}
        own = [one for one in record.records if (one["task"], one["item"]) in wanted]
        rows = summarise(own, tasks, DENSE)
        return {
            "settings": settings,
            "left_out": {task.name: left_out for task, (_, left_out) in read.items()},
            "out": str(record.folder),
            # NaN becomes null.
            "rows": json.loads(rows.to_json(orient="records", double_precision=12)),
        }

    def show(self, document: dict[str, Any]) -> list[Table | str]:
        """The document as tables and sentences."""
        tasks = find_tasks(",".join(dict.fromkeys(row["task"] for row in document["rows"])))
        notes = task_notes(document["rows"], tasks)
        notes += [
            f"{name}: {count} items of the shipped corpus were left out."
            for name, count in document["left_out"].items()
            if count
        ]
        notes.append(f"records: {document['out']}")
        return [*task_tables(document["rows"], tasks), *(f"- {note}" for note in notes)]


def _answer(
    record: TaskRun,
    engine: Engine,
    variants: Sequence[Variant],
    items: dict[Task, list[Item]],
    options: AskOptions,
) -> None:
    """Answer the items that have no record yet, and append theirs batch by batch."""

    def missing(batch: Sequence[Item]) -> list[Item]:
        return [item for item in batch if (item.task, item.id) not in record.finished]

    if not any(map(missing, items.values())):
        return
    with progress(f"loading {engine.model.name}", total=1):
        engine.load()
    # Batches are of all items, finished or not: an interrupted run continues with the same ones.
    waiting = [
        (task, left)
        for task, own in items.items()
        for batch in batches(engine, task, own, options)
        if (left := missing(batch))
    ]
    with progress("", total=len(waiting), unit="batches") as advance:
        for turn, (task, batch) in enumerate(waiting):
            done = len(record.finished)
            advance.stage(f"{task.title}, {len(batch)} items; {done} finished so far")
            record.append(answer_batch(engine, variants, task, batch, options, turn=turn))


def _environment() -> dict[str, Any]:
    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": probe_machine().cpu_model,
        "threads": torch.get_num_threads(),
        "versions": software_versions(),
    }
