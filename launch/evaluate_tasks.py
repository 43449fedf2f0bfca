"""The command `tasks` of evaluate.py: a head's answers to GSM8K, MATH-500 and others, beside
the dense head's."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from flashhead_dist.bench.environment import software_versions
from flashhead_dist.decode.answers import AskOptions, answer_batch, batches
from flashhead_dist.decode.engine import DENSE, Engine, Layout, Variant
from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.tasks import TASK_NAMES, Item, Task, find_tasks
from flashhead_dist.evaluate.tasks.base import read_items
from flashhead_dist.evaluate.tasks.records import TaskRun, summarise
from flashhead_dist.heads.registry import HEADS, named_head, needs_index
from flashhead_dist.heads.sampling import SamplingParameters
from flashhead_dist.index import ensure_index, load_manifest
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.progress import progress
from flashhead_dist.report.tables import report_console
from flashhead_dist.report.tasks import task_notes, task_tables
from flashhead_topology.probe import probe_machine
from rank_parser import DTYPES

COMMANDS = ("tasks",)
_HELP = """Decodes every item with the dense head (dense_local_max) and with --head, in batches that
take turns, and writes a record an item: prompts, both answers, the final answers, token counts. The
same command again goes on where it was ended; a higher --limit adds items.

--data has a folder a task with one .jsonl file: gsm8k/, math500/, mmlu_pro/, ifeval/, mt_bench/;
docs/guides/evaluation.md says where each is published and what its lines hold. Items that are in
the shipped corpus, over which default indexes are calibrated, are left out. ifeval needs lm-eval:
pip install 'flashhead-dist[lm-eval]'.

examples:
  launch/evaluate.py tasks --data DIR --tasks gsm8k --limit 50
  launch/evaluate.py tasks --data DIR --head flashhead,flashhead_escalate,flashhead_global@PUBLISHED
  launch/evaluate.py tasks --data DIR --model MODEL --chat --head flashhead --lossless 16
"""
_LEAST = {"limit": 1, "batch_size": 1, "max_new_tokens": 1, "num_probes": 1, "lossless": 0}


def add_commands(commands: Any) -> None:
    """Add the command to the subparsers of evaluate.py."""
    parser = commands.add_parser(
        "tasks",
        help="answers to tasks, beside the dense head's",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to answer")
    what.add_argument("--data", type=Path, required=True, metavar="DIR", help="the data sets")
    what.add_argument("--tasks", default=",".join(TASK_NAMES), metavar="A,B", help="default: all")
    what.add_argument("--limit", type=int, metavar="N", help="items of each task (default: all)")
    what.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="an answer (default: 256, as the tasks say)"
    )
    what.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    how = parser.add_argument_group("with what")
    how.add_argument("--model", help="HF folder, .gguf file or hub id (default: built in)")
    how.add_argument("--index", type=Path, metavar="DIR", help="index folder (default: cached)")
    how.add_argument(
        "--head",
        default="flashhead",
        metavar="NAME[:PROBES][@DIR],...",
        help=f"beside {DENSE}, each with its number of probes and an index folder where they are "
        f"not those below: {', '.join(name for name in HEADS if name != DENSE)}",
    )
    how.add_argument(
        "--lossless", type=int, default=0, metavar="N", help="each --head checked as well, every N"
    )
    how.add_argument("--num-probes", type=int, metavar="P", help="default: the index's")
    how.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="default: fp32")
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    how.add_argument("--batch-size", type=int, default=8, metavar="N", help="items at once")
    out = parser.add_argument_group("what to write")
    out.add_argument(
        "--out", type=Path, default=Path("runs/tasks"), metavar="DIR", help="default: runs/tasks"
    )
    out.add_argument("--json", action="store_true", help="one JSON document on stdout")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Answer what is not answered yet; returns the document of all records."""
    tasks, variants = _check(arguments)
    items: dict[Task, list[Item]] = {}
    left_out = {}
    for task in tasks:
        found, left_out[task.name] = read_items(task, arguments.data)
        items[task] = found[: arguments.limit]
    model = open_model(arguments.model)
    index = arguments.index
    if index is None and any(needs_index(v.head) and v.index is None for v in variants):
        index = ensure_index(model)
    options = AskOptions(
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        chat=arguments.chat,
    )
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = _settings(arguments, variants, model, index, options, device)
    record = TaskRun(arguments.out, settings, _about())
    engine = Engine(
        model=model,
        index_dir=index,
        variants=variants,
        layout=Layout(),
        dtype=DTYPES[arguments.dtype],
        device=device,
        parameters=SamplingParameters(),
        num_probes=arguments.num_probes,
    )
    try:
        _answer(record, engine, variants, items, options)
    except KeyboardInterrupt:
        count = len(record.finished)
        print(
            f"\n{count} items are kept in {record.folder}: the same command goes on from there",
            file=sys.stderr,
        )
        raise
    wanted = {(item.task, item.id) for own in items.values() for item in own}
    own = [one for one in record.records if (one["task"], one["item"]) in wanted]
    rows = summarise(own, tasks, DENSE)
    return {
        "settings": settings,
        "left_out": left_out,
        "out": str(record.folder),
        # NaN becomes null.
        "rows": json.loads(rows.to_json(orient="records", double_precision=12)),
    }


def show(document: dict[str, Any]) -> None:
    """Print the document as tables and sentences."""
    console = report_console()
    tasks = find_tasks(",".join(dict.fromkeys(row["task"] for row in document["rows"])))
    for table in task_tables(document["rows"], tasks):
        console.print(table)
    notes = task_notes(document["rows"], tasks)
    notes += [
        f"{name}: {count} items that are in the shipped corpus were left out."
        for name, count in document["left_out"].items()
        if count
    ]
    for note in [*notes, f"records: {document['out']}"]:
        console.print(f"- {note}", markup=False, highlight=False, soft_wrap=True)


def _check(arguments: argparse.Namespace) -> tuple[list[Task], list[Variant]]:
    """What is seen to be wrong at once, before anything is loaded."""
    for name, least in _LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: give {least} or more")
    heads = [named_head(text) for text in arguments.head.split(",") if text]
    if not heads:
        raise UserError(f"--head names none: choose from {', '.join(HEADS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU, and there is none here: leave it out")
    if arguments.index is not None:
        load_manifest(arguments.index)
    tasks = find_tasks(arguments.tasks)
    for task in tasks:
        task.require()
    checked = [arguments.lossless] if arguments.lossless else []
    variants = [
        Variant(head.name, every, head.num_probes, head.index)
        for head in heads
        for every in (0, *checked)
    ]
    return tasks, list(dict.fromkeys([Variant(DENSE), *variants]))


def _answer(
    record: TaskRun,
    engine: Engine,
    variants: Sequence[Variant],
    items: dict[Task, list[Item]],
    options: AskOptions,
) -> None:
    """Answer the items that have no record yet, and append theirs batch by batch."""
    if all((item.task, item.id) in record.finished for own in items.values() for item in own):
        return
    with progress("starting", total=1, visible=True) as advance:
        advance.stage(f"loading {engine.model.name}")
        engine.load()
    # Batches are of all items, finished or not: a run that was ended goes on with the same ones.
    every = [
        (task, batch)
        for task, own in items.items()
        for batch in batches(engine, task, own, options)
    ]
    waiting = [
        (task, missing)
        for task, batch in every
        if (missing := [item for item in batch if (item.task, item.id) not in record.finished])
    ]
    with progress("starting", total=len(waiting), visible=True) as advance:
        for turn, (task, batch) in enumerate(waiting):
            done = len(record.finished)
            advance.stage(f"{task.title}, {len(batch)} items; {done} kept so far")
            record.append(answer_batch(engine, variants, task, batch, options, turn=turn))


def _settings(
    arguments: argparse.Namespace,
    variants: Sequence[Variant],
    model: ModelSource,
    index: Path | None,
    options: AskOptions,
    device: torch.device,
) -> dict[str, Any]:
    """What records of one folder have in common."""
    manifest = None if index is None else load_manifest(index)
    own = {str(v.index): load_manifest(v.index).index_hash for v in variants if v.index is not None}
    return {
        "model": model.name,
        "weight_hash": model.weight_hash,
        "index_hash": None if manifest is None else manifest.index_hash,
        "head": arguments.head,
        "lossless": arguments.lossless,
        "num_probes": arguments.num_probes,
        "dtype": arguments.dtype,
        "device": device.type,
        **asdict(options),
        # Left out where there are none, as in records of before heads had indexes of their own.
        **({"named_index_hashes": own} if own else {}),
    }


def _about() -> dict[str, Any]:
    """What else is worth knowing of a run."""
    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": probe_machine().cpu_model,
        "threads": torch.get_num_threads(),
        "versions": software_versions(),
    }
