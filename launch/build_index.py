"""Build the index that FlashHead probes, or describe one.

    python launch/build_index.py                        the default model's, in the cache
    python launch/build_index.py --model DIR --out my_index --cluster-size 8 --num-probes 1024
    python launch/build_index.py --synthetic 32768,256
    python launch/build_index.py --inspect my_index      what it holds, and whether it is intact

Reads the output embedding, clusters its rows in the metric of calibration hidden states (the model
over a shipped corpus, computed once), refines the clusters, rounds their centroids, chooses alpha
and pinned tokens on the calibration states and measures fidelity on the test states. Without --out
the index goes to the cache, where the other commands find it; one that is there is kept. Nothing is
left behind where a build ends early.

Gemma-3-270M takes about three minutes on two cores, 2 GB of memory, and a minute more the first
time, for the hidden states. The same options and seed give the same index, whatever the number of
threads.

Exit codes: 0, 2 for a mistake in what was given, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from flashhead_dist.errors import INTERRUPTED, UserError
from flashhead_dist.index import (
    IndexManifest,
    IndexOptions,
    ensure_index,
    load_manifest,
    load_shard,
)
from flashhead_dist.index.build import (
    BuildInputs,
    States,
    build_from,
    default_index_path,
    default_states,
)
from flashhead_dist.index.options import CENTROID_BITS, CentroidKind, Method
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.states import (
    HiddenStates,
    collect_hidden_states,
    load_hidden_states,
    require_hidden_size,
)
from flashhead_dist.states.split import parse_hold_out, read_texts, set_aside, shipped_texts
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_topology.probe import probe_machine

_DEFAULTS = IndexOptions()
_OPTION_NAMES = (
    "cluster_size", "centroid_bits", "group_size", "centroid_columns", "num_groups",
    "learned_pins_per_group", "pin_special_tokens", "method", "centroid_kind", "alpha",
    "num_probes", "metric_exponent", "seed",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        path = arguments.inspect
        if path is None:
            with compute_threads(arguments.threads or probe_machine().num_cores):
                path = _build(arguments)
        manifest = load_manifest(path)
        if arguments.inspect is not None:
            # Reading every group compares it with its hash.
            load_shard(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nerror: interrupted; no index was stored.", file=sys.stderr)
        return INTERRUPTED
    if arguments.json:
        print(json.dumps(_document(path, manifest)))
    else:
        _print_description(path, manifest, intact=arguments.inspect is not None)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inspect", type=Path, metavar="DIR", help="describe an index and end")
    what = parser.add_argument_group("what to index")
    what.add_argument("--model", help="HF folder, .gguf file or hub id (default: built in)")
    what.add_argument("--synthetic", metavar="V,D", help="a made-up embedding, marked as such")
    what.add_argument("--texts", type=Path, metavar="PATH", help="your corpus: a file or folder")
    what.add_argument(
        "--calibration", type=Path, metavar="FILE", help="hidden states [N, D] to calibrate on"
    )
    what.add_argument("--test", type=Path, metavar="FILE", help="hidden states [N, D] to test on")
    what.add_argument(
        "--hold-out", default="", metavar="NAMES",
        help="texts that calibrate nothing and test the index: sources and data sets, or "
        "languages=N,data-sets=N by the rule of launch/tune.py",
    )  # fmt: skip
    how = parser.add_argument_group("how to index")
    how.add_argument("--method", choices=get_args(Method), default=_DEFAULTS.method)
    how.add_argument(
        "--cluster-size",
        type=int,
        default=_DEFAULTS.cluster_size,
        metavar="S",
        help="tokens a cluster, a power of two from 1 to 64 (default: %(default)s)",
    )
    how.add_argument(
        "--centroid-bits", type=int, choices=CENTROID_BITS, default=_DEFAULTS.centroid_bits
    )
    how.add_argument(
        "--group-size", type=int, default=_DEFAULTS.group_size, metavar="N",
        help="columns that share a centroid's scale (default: %(default)s)",
    )  # fmt: skip
    how.add_argument(
        "--centroid-columns", type=int, metavar="N",
        help="that a centroid keeps, of the axes that matter to hidden states (default: all)",
    )  # fmt: skip
    how.add_argument("--centroid-kind", choices=get_args(CentroidKind), default="mean")
    how.add_argument(
        "--groups",
        dest="num_groups",
        type=int,
        default=_DEFAULTS.num_groups,
        metavar="G",
        help="probing groups, the most ranks that can share the index (default: %(default)s)",
    )
    how.add_argument(
        "--num-probes", type=int, metavar="P", help="default: one candidate in 32 rows"
    )
    how.add_argument("--alpha", type=float, metavar="A", help="default: calibrated")
    how.add_argument(
        "--metric-exponent", type=float, default=_DEFAULTS.metric_exponent, metavar="E",
        help="0: Euclidean clusters, 1: the hidden states' own metric (default: %(default)s)",
    )  # fmt: skip
    how.add_argument(
        "--pin", type=_token_ids, default=(), metavar="ID,ID", help="tokens always scored"
    )
    how.add_argument(
        "--learned-pins", dest="learned_pins_per_group", type=int, metavar="N",
        default=_DEFAULTS.learned_pins_per_group,
        help="most pins a group that calibration may add (default: %(default)s)",
    )  # fmt: skip
    how.add_argument(
        "--pin-special", dest="pin_special_tokens", action=argparse.BooleanOptionalAction,
        default=_DEFAULTS.pin_special_tokens, help="pin the tokenizer's special tokens as well",
    )  # fmt: skip
    how.add_argument("--seed", type=int, default=_DEFAULTS.seed, metavar="N")
    where = parser.add_argument_group("where")
    where.add_argument("--out", type=Path, metavar="DIR", help="default: the cache")
    where.add_argument("--force", action="store_true", help="replace an index that is there")
    where.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    where.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    where.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def _token_ids(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number.strip())


_token_ids.__name__ = "comma-separated token ids"  # argparse names it so where it fails


def _build(arguments: argparse.Namespace) -> Path:
    if arguments.threads is not None and arguments.threads < 1:
        raise UserError(f"--threads is {arguments.threads}: give 1 or more")
    options = IndexOptions(
        pinned_token_ids=arguments.pin,
        **{name: getattr(arguments, name) for name in _OPTION_NAMES},
    )
    model = open_model(arguments.model, synthetic=arguments.synthetic)
    options.check(model.vocab_size, model.hidden_size)
    own_states = any((arguments.texts, arguments.calibration, arguments.test, arguments.hold_out))
    if arguments.out is None and not own_states:
        path = default_index_path(model, options)
        if arguments.force or not path.exists():
            return ensure_index(
                model, options, device=arguments.device, replace_existing=arguments.force
            )
        print(f"{path} is there already; --force builds it again.", file=sys.stderr)
        return path
    if arguments.out is None:
        raise UserError("an index of states of your own has no place in the cache: give --out DIR")
    return build_from(
        model,
        options,
        _inputs(arguments, model),
        arguments.out,
        device=arguments.device,
        replace_existing=arguments.force,
    )


def _inputs(arguments: argparse.Namespace, model: ModelSource) -> BuildInputs:
    """Calibration and test states, files where given, else those of a corpus; what is held out."""
    if arguments.hold_out:
        if model.synthetic or arguments.calibration or arguments.test:
            raise UserError("--hold-out needs texts: leave out --synthetic, --calibration, --test")
        documents = read_texts(arguments.texts) if arguments.texts else shipped_texts()
        hold_out = parse_hold_out(arguments.hold_out, documents)
        parts = set_aside(*collect_hidden_states(model, arguments.texts), documents, hold_out)
        return BuildInputs(
            parts.calibration, parts.held_out, notes={"held_out": list(hold_out.names)}
        )
    return BuildInputs(*_all_states(arguments, model))


def _all_states(arguments: argparse.Namespace, model: ModelSource) -> States:
    if arguments.texts is not None and (arguments.calibration or arguments.test):
        raise UserError("--texts makes both parts: leave out --calibration and --test, or --texts")
    if arguments.calibration or arguments.test:
        return _loaded(arguments.calibration, model), _loaded(arguments.test, model)
    if arguments.texts is not None:
        return collect_hidden_states(model, arguments.texts)
    return default_states(model, None, True)


def _loaded(path: Path | None, model: ModelSource) -> HiddenStates | None:
    if path is None:
        return None
    states = load_hidden_states(path)
    require_hidden_size(states, model.hidden_size, model.name)
    return states


def _document(path: Path, manifest: IndexManifest) -> dict[str, Any]:
    fields = asdict(manifest)
    del fields["group_sha256"]
    return {
        "path": str(path),
        "index_hash": manifest.index_hash,
        "bytes_share": manifest.bytes_share,
        **fields,
    }


def _print_description(path: Path, manifest: IndexManifest, *, intact: bool) -> None:
    console = Console()
    made_up = ", synthetic" if manifest.synthetic else ""
    per_group = -(-manifest.num_probes // manifest.num_groups)
    table = Table(title=f"Index {path}", show_header=False)
    integers = f"int{manifest.bits}, a scale per {manifest.group_size} columns"
    rows = {
        "model": f"{manifest.model_name}{made_up}: V {manifest.vocab_size:,}, "
        f"D {manifest.hidden_size:,}, {manifest.dtype}, weights {manifest.weight_hash[:12]}",
        "clusters": f"{manifest.num_clusters:,} of {manifest.cluster_size} tokens in "
        f"{manifest.num_groups} probing groups, by {manifest.method} and {manifest.rounds} "
        f"rounds of refinement, seed {manifest.seed}",
        "cohesion": f"{manifest.cohesion:.3f} (mean cosine of a row to its cluster's mean)",
        "centroids": f"{manifest.centroid_kind}, "
        f"{'bfloat16' if manifest.bits == 16 else integers}; "
        f"{manifest.centroid_bytes / 1e6:.1f} MB",
        "probes": f"{manifest.num_probes:,} by default, {per_group} a group: "
        f"{per_group * manifest.num_groups * manifest.cluster_size:,} candidate rows; "
        f"alpha {manifest.alpha:g}",
        "pinned": f"{manifest.num_pinned} slot(s) a group; "
        f"{len(manifest.calibration.get('learned_pinned_token_ids', []))} tokens learned, "
        f"{len(manifest.calibration.get('special_token_ids', []))} special",
        "bytes a step": f"{100 * manifest.bytes_share:.2f} % of a bfloat16 dense head's",
        "fidelity": _fidelity(manifest),
        "stored": f"{manifest.data_bytes / 1e6:.1f} MB, built in {manifest.build_seconds:.0f} s"
        + ("; every group is intact" if intact else ""),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    # Whole on a line of its own, for whoever copies it.
    console.print(f"index hash {manifest.index_hash}", soft_wrap=True, highlight=False)


def _fidelity(manifest: IndexManifest) -> str:
    found = manifest.fidelity
    if not found:
        return "not measured: there were no test states"
    return (
        f"dense argmax among the candidates for {100 * found['top1_agreement']:.2f} % of "
        f"{found['num_states']:,} test states, "
        f"{100 * found['top1_agreement_worst_source']:.2f} % in the worst source "
        f"({found['worst_source']})"
    )


if __name__ == "__main__":
    sys.exit(main())
