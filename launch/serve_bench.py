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
servers and keeps the records; launch/report.py FOLDER makes their page. Protocol: docs/vllm.md.

Exit codes: 0, 2 for a mistake in what was given or a server that does not start, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashhead_dist.bench.environment import software_versions, source_commit
from flashhead_dist.bench.records import make_run_folder
from flashhead_dist.decode.prompts import read_prompts
from flashhead_dist.errors import INTERRUPTED, UserError
from flashhead_dist.index import ensure_index, load_manifest
from flashhead_dist.models import open_model
from flashhead_dist.models.cache import cache_root
from flashhead_dist.models.default_model import default_model_folder
from flashhead_dist.progress import progress
from flashhead_dist.report.present import report_console
from flashhead_dist.report.serving import serving_document, serving_notes, serving_table
from flashhead_dist.report.write import write_page
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
from rank_parser import integers

_ENVIRONMENT = Path(__file__).resolve().parent.parent / ".venv-vllm" / "bin" / "python"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to serve")
    what.add_argument("--model", help="Hugging Face folder (default: the built-in Gemma-3-270M)")
    what.add_argument("--index", type=Path, metavar="DIR", help="default: the model's, cached")
    what.add_argument(
        "--flashhead", default="{}", metavar="JSON", help="further options of the plugin"
    )
    what.add_argument("--dtype", default="bfloat16", help="default: bfloat16")
    what.add_argument(
        "--python", type=Path, metavar="FILE", help="that has vLLM (default: this or .venv-vllm's)"
    )
    what.add_argument(
        "--server-arguments", default="", metavar="TEXT", help="for vLLM, such as --enforce-eager"
    )
    what.add_argument(
        "--kv-cache-mb", type=int, default=1024, metavar="N", help="on a CPU (default: 1024)"
    )
    load = parser.add_argument_group("under what load")
    load.add_argument("--tp-sizes", type=integers, default=(1, 2), metavar="N,N", help="1,2")
    load.add_argument(
        "--concurrency", type=integers, default=(1, 4, 16), metavar="N,N", help="1,4,16"
    )
    load.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    load.add_argument("--new-tokens", type=int, default=48, metavar="N", help="default: 48")
    load.add_argument(
        "--requests", type=int, default=20, metavar="N", help="of a call, at least (default: 20)"
    )
    load.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one a line, or .jsonl (default: twenty)"
    )
    out = parser.add_argument_group("what to write")
    out.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR")
    out.add_argument("--json", action="store_true", help="one JSON document as the last line")
    return parser


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """The plugin's further options; raises UserError for a value that cannot be right."""
    for flag in ("rounds", "new_tokens", "requests", "kv_cache_mb"):
        value = getattr(arguments, flag)
        if value < 1:
            raise UserError(f"--{flag.replace('_', '-')} is {value}: give 1 or more")
    for flag in ("tp_sizes", "concurrency"):
        if min(getattr(arguments, flag), default=0) < 1:
            raise UserError(f"--{flag.replace('_', '-')} holds no size or one below 1: give 1,2")
    try:
        options: Any = json.loads(arguments.flashhead)
    except ValueError as error:
        raise UserError(f"--flashhead {arguments.flashhead} is no JSON ({error})") from error
    if not isinstance(options, dict):
        raise UserError(f"--flashhead {arguments.flashhead} is no JSON object: give {{...}}")
    if arguments.model is not None and not Path(arguments.model).expanduser().is_dir():
        raise UserError(
            f"--model {arguments.model} is no folder: give a Hugging Face folder on this machine"
        )
    if arguments.index is not None:
        load_manifest(arguments.index)
    return options


def measure(arguments: argparse.Namespace, folders: list[Path]) -> None:
    """Run the benchmark and print its results; raises UserError.

    folders: receives the run folder once it exists.
    """
    plugin_options = check(arguments)
    python = find_python(arguments.python, _ENVIRONMENT)
    versions = software_versions() | vllm_versions(python)
    machine = probe_machine()
    plan = Plan(
        prompts=tuple(read_prompts(arguments.prompts)),
        new_tokens=arguments.new_tokens,
        least_requests=arguments.requests,
        tp_sizes=tuple(sorted(set(arguments.tp_sizes))),
        concurrencies=tuple(sorted(set(arguments.concurrency))),
        rounds=arguments.rounds,
    )
    source = open_model(arguments.model)
    model = Path(arguments.model).expanduser().resolve() if arguments.model else None
    model = model or default_model_folder(cache_root())
    index = arguments.index or ensure_index(source)
    about = {
        "system": machine.host_class,
        "device": machine.gpus[0].name if machine.gpus else machine.cpu_model,
        "dtype": arguments.dtype,
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
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
    }
    folder = make_run_folder(
        arguments.runs_dir, machine.host_class, about["commit"], environment, datetime.now(UTC)
    )
    folders.append(folder)
    oversubscribed = {
        size: oversubscription(size, machine.num_cores, len(machine.gpus)).oversubscribed
        for size in plan.tp_sizes
    }

    def server(head: str, tp_size: int) -> ServerOptions:
        on = {"index": str(index.resolve()), **plugin_options}
        return ServerOptions(
            python=python,
            model=model,
            tp_size=tp_size,
            # False: an index in the model's folder would switch FlashHead on.
            flashhead=on if head == FLASHHEAD else False,
            dtype=arguments.dtype,
            device="cuda" if machine.gpus else "cpu",
            cores=machine.num_cores,
            kv_cache_mb=arguments.kv_cache_mb,
            more=("--no-enable-prefix-caching", *arguments.server_arguments.split()),
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
    with progress("starting", total=num_stages) as advance:
        run_bench(plan, server, folder, on_result=on_result, on_stage=advance.stage)
    summary = summarise(read_serving(folder))
    page = write_page(folder) if find_spec("matplotlib") and find_spec("jinja2") else None
    console = report_console()
    console.print(serving_table(summary))
    sizes = [size for size, is_over in oversubscribed.items() if is_over]
    warnings = [f"OVERSUBSCRIBED at tp {size}: its times mean nothing." for size in sizes]
    for note in [*serving_notes(summary), *warnings]:
        console.print(f"- {note}", markup=False, highlight=False)
    for path in (folder / SERVING_NAME, page):
        if path is not None:
            print(f"wrote {path}")
    if arguments.json:
        print(json.dumps({"run": str(folder), **about, "rows": serving_document(summary)}))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return an exit code."""
    folders: list[Path] = []
    try:
        measure(_parser().parse_args(argv), folders)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        message = "Nothing was measured yet."
        for path in (folder / SERVING_NAME for folder in folders):
            if path.exists():
                message = (
                    f"The records so far are in {path}; launch/report.py {path.parent} shows them."
                )
        print(f"\nerror: interrupted. {message}", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
