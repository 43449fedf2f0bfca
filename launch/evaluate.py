"""Quality of a head: how faithful it is to the dense head on real hidden states.

    python launch/evaluate.py fidelity
    python launch/evaluate.py fidelity --head flashhead --tp-size 8 --json
    python launch/evaluate.py fidelity --index runs/my_index --hidden-states states.safetensors
    python launch/evaluate.py sampling
    python launch/evaluate.py likelihood --tokens 20000

`sampling` holds 200,000 draws at temperatures 0.7 and 1.0 against the dense distribution, and draws
them at tp 1, 2 and 3; `likelihood` compares perplexities under the closed form and the dense head.

Without --index the default index of the model is used, and built where it is missing; without
--hidden-states the test part of the shipped corpus, run through the model once. All ranks of
--tp-size run in this one process, one after another, and give what real gloo ranks give.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import evaluate_sampling
from flashhead_dist.errors import UserError
from flashhead_dist.evaluate.fidelity import Fidelity, evaluate_fidelity
from flashhead_dist.evaluate.truth import dense_truth
from flashhead_dist.heads.registry import HEAD_NAMES, check_head_names, emulate_head, needs_index
from flashhead_dist.hidden_states import (
    HiddenStates,
    collect_hidden_states,
    load_hidden_states,
    require_hidden_size,
    synthetic_hidden_states,
)
from flashhead_dist.index import ensure_index, load_manifest
from flashhead_dist.measure.watch import INTERRUPTED
from flashhead_dist.model_source import ModelSource, open_model


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 for a user's mistake."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command != "fidelity":
            return _finish(arguments, evaluate_sampling.run(arguments))
        document, fidelity = _fidelity(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nerror: interrupted.", file=sys.stderr)
        return INTERRUPTED
    if arguments.json:
        print(json.dumps(document))
    else:
        _print_table(document, fidelity)
    return 0


def _finish(arguments: argparse.Namespace, document: dict[str, Any]) -> int:
    if arguments.json:
        print(json.dumps(document))
    else:
        evaluate_sampling.show(document)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fidelity = commands.add_parser("fidelity", help="a head against the dense head")
    fidelity.add_argument("--model", help="HF folder, .gguf file or hub id (default: built in)")
    fidelity.add_argument("--synthetic", metavar="V,D", help="a made-up embedding, marked as such")
    fidelity.add_argument("--index", type=Path, metavar="DIR", help="index folder")
    fidelity.add_argument(
        "--hidden-states", type=Path, metavar="FILE", help="safetensors with hidden_states [N, D]"
    )
    fidelity.add_argument(
        "--head", default="flashhead", metavar="NAME", help=f"one of {', '.join(HEAD_NAMES)}"
    )
    fidelity.add_argument("--tp-size", type=int, default=1, metavar="N", help="ranks to emulate")
    fidelity.add_argument(
        "--num-probes", type=int, metavar="P", help="clusters probed in all (default: the index's)"
    )
    fidelity.add_argument("--alpha", type=float, metavar="A", help="default: the index's")
    fidelity.add_argument("--device", default="cpu", help="where the head runs: cpu or cuda")
    fidelity.add_argument("--json", action="store_true", help="one JSON document on stdout")
    evaluate_sampling.add_commands(commands)
    return parser


def _fidelity(arguments: argparse.Namespace) -> tuple[dict[str, Any], Fidelity]:
    # What is quickly seen to be wrong comes before what takes minutes.
    check_head_names([arguments.head])
    _check_device(arguments.device)
    index_dir = arguments.index
    if index_dir is not None:
        load_manifest(index_dir)
    states = None
    if arguments.hidden_states is not None:
        states = load_hidden_states(arguments.hidden_states)
    model = open_model(arguments.model, synthetic=arguments.synthetic)
    if states is not None:
        require_hidden_size(states, model.hidden_size, model.name)
    if index_dir is None and needs_index(arguments.head):
        index_dir = ensure_index(model)
    head = emulate_head(
        arguments.head,
        tp_size=arguments.tp_size,
        model=model,
        index_dir=index_dir,
        num_probes=arguments.num_probes,
        alpha=arguments.alpha,
        device=arguments.device,
    )
    if states is None:
        states = _test_states(model)
    truth = dense_truth(model, states.states)
    fidelity = evaluate_fidelity(head, states, truth, device=arguments.device)
    document = fidelity.to_json() | {
        "model": model.name,
        "weight_hash": model.weight_hash,
        "synthetic": model.synthetic,
        "index_hash": load_manifest(index_dir).index_hash if index_dir else None,
        "hidden_states": states.origin,
    }
    return document, fidelity


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    here = device.type == "cpu" or (
        device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
    )
    if not here:
        raise UserError(f"device {name} is not there: use cpu, or cuda on a machine with a GPU")


def _test_states(model: ModelSource) -> HiddenStates:
    if model.synthetic:
        return synthetic_hidden_states(model)[1]
    return collect_hidden_states(model)[1]


def _print_table(document: dict[str, Any], fidelity: Fidelity) -> None:
    console = Console()
    made_up = " (synthetic)" if document["synthetic"] else ""
    title = (
        f"{fidelity.head} at tp_size {fidelity.tp_size}, emulated in one process, against the "
        f"dense head of {document['model']}{made_up}"
    )
    table = Table(title=title, caption=f"hidden states: {document['hidden_states']}")
    table.add_column("source")
    table.add_column("states", justify="right")
    table.add_column("top-1 agreement, %", justify="right")
    for source, share in sorted(fidelity.top1_agreement_by_source.items(), key=lambda x: x[1]):
        table.add_row(source, str(fidelity.num_states_by_source[source]), f"{100 * share:.2f}")
    table.add_section()
    table.add_row("all", str(fidelity.num_states), f"{100 * fidelity.top1_agreement:.2f}")
    console.print(table)
    log_z = "none"
    if fidelity.logz_error is not None:
        log_z = f"{fidelity.logz_error:+.4f} nats mean, {fidelity.logz_error_p99:.4f} at p99"
    console.print(
        f"top-10 containment {100 * fidelity.top10_containment:.2f} %, "
        f"candidate mass {100 * fidelity.candidate_mass:.2f} %, log Z error {log_z}, "
        f"bytes {100 * fidelity.bytes_share:.2f} % of the dense head's in bf16"
    )


if __name__ == "__main__":
    sys.exit(main())
