"""Serve a model by vLLM with its own head and with FlashHead, in turns, under the same load.

    python launch/serve_bench.py                          tp 1 and 2; 1, 4 and 16 requests at once
    python launch/serve_bench.py --tp-sizes 1 --concurrency 1 --rounds 5 --new-tokens 64
    python launch/serve_bench.py --model DIR --index DIR --python /opt/vllm/bin/python --json

Both servers of a tp size are up at once, the idle one is frozen, and vLLM's own benchmark client
sends the same prompts to each, greedy, without an end of text. `make test-vllm` makes an
environment that has vLLM (.venv-vllm); this script itself runs with or without it.

Writes serving.jsonl (a line a call of the client), environment.json, the servers' logs and
report/report.html to RUNS_DIR/<date>_<host class>_<commit>/ and prints a table: tokens a second,
TTFT and TPOT (p50, p99), and the share of greedy texts equal to the dense server's. Ctrl-C ends the
servers and keeps the records; launch/report.py FOLDER makes their page. Protocol:
docs/guides/vllm.md.

Exit codes: 0, 2 for a mistake in what was given or a server that does not start, 130 after Ctrl-C.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashhead_dist.bench.environment import software_versions, source_commit
from flashhead_dist.bench.records import make_run_folder
from flashhead_dist.decode.prompts import read_prompts
from flashhead_dist.errors import UserError
from flashhead_dist.index import load_manifest
from flashhead_dist.models.cache import cache_root
from flashhead_dist.models.default_model import default_model_folder
from flashhead_dist.progress import progress
from flashhead_dist.report.serving import serving_document, serving_notes, serving_table, write_page
from flashhead_dist.report.tables import report_console
from flashhead_dist.serving.bench import FLASHHEAD, HEADS, Plan, Served, Turn, run_bench
from flashhead_dist.serving.records import (
    SCHEMA_VERSION,
    SERVING_NAME,
    ServingRecord,
    append_record,
    read_serving,
    summarise,
)
from flashhead_dist.serving.server import ServerOptions, find_python, vllm_versions
from flashhead_topology.machine import oversubscription
from flashhead_topology.probe import probe_machine
from options import (
    File,
    Folder,
    IndexedModel,
    Integers,
    JsonOutput,
    Positive,
    Value,
    parse,
    run_command,
    values,
)

_ENVIRONMENT = Path(__file__).resolve().parent.parent / ".venv-vllm" / "bin" / "python"


@dataclass(kw_only=True)
class Options(IndexedModel, JsonOutput):
    """Options of the script."""

    flashhead: Value[str] = "{}"
    """further options of the plugin, as JSON"""
    dtype: Value[str] = "bfloat16"
    """of weights and activations"""
    python: File[Path | None] = None
    """an interpreter that has vLLM (default: this or .venv-vllm's)"""
    server_arguments: Value[str] = ""
    """for vLLM, such as --enforce-eager"""
    kv_cache_mb: Positive[int] = 1024
    """of a server on a CPU"""
    tp_sizes: Integers[list[int]] = field(default_factory=lambda: [1, 2])
    """tensor-parallel sizes"""
    concurrency: Integers[list[int]] = field(default_factory=lambda: [1, 4, 16])
    """requests at once"""
    rounds: Positive[int] = 3
    """calls of the client for each head, size and concurrency"""
    new_tokens: Positive[int] = 48
    """of a request"""
    requests: Positive[int] = 20
    """of a call, at least"""
    prompts: File[Path | None] = None
    """one a line, or .jsonl (default: twenty)"""
    runs_dir: Folder[Path] = Path("runs")
    """where run folders are made"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, sizes in (("--tp-sizes", self.tp_sizes), ("--concurrency", self.concurrency)):
            if min(sizes, default=0) < 1:
                raise UserError(f"{flag} holds no size or one below 1: give 1,2")
        try:
            self.plugin_options: Any = json.loads(self.flashhead)
        except ValueError as error:
            raise UserError(f"--flashhead {self.flashhead} is no JSON ({error})") from error
        if not isinstance(self.plugin_options, dict):
            raise UserError(f"--flashhead {self.flashhead} is no JSON object: give {{...}}")
        if self.model is not None and not Path(self.model).expanduser().is_dir():
            raise UserError(
                f"--model {self.model} is no folder: give a Hugging Face folder on this machine"
            )
        if self.index is not None:
            load_manifest(self.index)


def measure(options: Options) -> dict[str, Any] | None:
    """Run the benchmark and print its results.

    Raises:
        UserError: a mistake in what was given, or a server that does not start.
    """
    python = find_python(options.python, _ENVIRONMENT)
    versions = software_versions() | vllm_versions(python)
    machine = probe_machine()
    plan = Plan(
        prompts=tuple(read_prompts(options.prompts)),
        new_tokens=options.new_tokens,
        least_requests=options.requests,
        tp_sizes=tuple(sorted(set(options.tp_sizes))),
        concurrencies=tuple(sorted(set(options.concurrency))),
        rounds=options.rounds,
    )
    source = options.open()
    index = options.index_folder(source)
    model = default_model_folder(cache_root())
    if options.model is not None:
        model = Path(options.model).expanduser().resolve()
    assert index is not None
    about: dict[str, Any] = {
        "system": machine.host_class,
        "device": machine.gpus[0].name if machine.gpus else machine.cpu_model,
        "dtype": options.dtype,
        "model": source.name,
        "model_hash": source.weight_hash,
        "index_hash": load_manifest(index).index_hash,
        "versions": versions,
        "commit": source_commit(),
    }
    environment = {
        "machine": machine.as_dict(),
        "versions": versions,
        "commit": about["commit"],
        "arguments": {name: str(value) for name, value in values(options).items()},
    }
    folder = make_run_folder(
        options.runs_dir, machine.host_class, about["commit"], environment, datetime.now(UTC)
    )
    oversubscribed = {
        size: oversubscription(size, machine.num_cores, len(machine.gpus)).oversubscribed
        for size in plan.tp_sizes
    }

    def server(head: str, tp_size: int) -> ServerOptions:
        on = {"index": str(index.resolve()), **options.plugin_options}
        return ServerOptions(
            python=python,
            model=model,
            tp_size=tp_size,
            # False: an index in the model's folder would switch FlashHead on.
            flashhead=on if head == FLASHHEAD else False,
            dtype=options.dtype,
            device="cuda" if machine.gpus else "cpu",
            cores=machine.num_cores,
            kv_cache_mb=options.kv_cache_mb,
            more=("--no-enable-prefix-caching", *options.server_arguments.split()),
        )

    def on_result(turn: Turn, served: Served) -> None:
        record = ServingRecord(
            schema_version=SCHEMA_VERSION,
            time_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            **turn._asdict(),
            num_requests=len(served.texts),
            new_tokens=plan.new_tokens,
            oversubscribed=oversubscribed[turn.tp_size],
            **about,
            **asdict(served),
        )
        append_record(record, folder)

    num_stages = sum(len(HEADS) + len(plan.turns(size)) for size in plan.tp_sizes)
    try:
        with progress("starting", total=num_stages) as advance:
            run_bench(plan, server, folder, on_result=on_result, on_stage=advance.stage)
    except KeyboardInterrupt:
        path = folder / SERVING_NAME
        if path.exists():
            say = f"the records so far are in {path}; launch/report.py {folder} shows them"
            print(f"\n{say}", file=sys.stderr)
        raise
    summary = summarise(read_serving(folder))
    paths = [folder / SERVING_NAME]
    if find_spec("matplotlib") and find_spec("jinja2"):
        paths.append(write_page(folder))
    console = report_console()
    console.print(serving_table(summary))
    sizes = [size for size, is_over in oversubscribed.items() if is_over]
    warnings = [f"OVERSUBSCRIBED at tp {size}: its times mean nothing." for size in sizes]
    for note in [*serving_notes(summary), *warnings]:
        console.print(f"- {note}", markup=False, highlight=False)
    for path in paths:
        print(f"wrote {path}")
    document = {"run": str(folder), **about, "rows": serving_document(summary)}
    return document if options.json else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return an exit code."""
    return run_command(lambda: measure(parse(Options, argv, "launch/serve_bench.py", __doc__)))


if __name__ == "__main__":
    sys.exit(main())
