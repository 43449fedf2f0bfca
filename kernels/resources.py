"""What each Triton kernel takes of a processor, compiled ahead of time: no GPU is needed.

    python kernels/resources.py                 for compute capability 9.0 (H100, H200)
    python kernels/resources.py --capability 80 --json

Registers and stack of a thread (stack above 0: registers were spilled), shared memory of a program
in bytes; in its PTX integer dot products (dp4a), 16-byte loads and fused multiply-adds (fma: none
where centroids are scored, so that every kernel scores them alike). Shapes are those of the default
index of each model (4 tokens a cluster, 128 groups, int4 with a scale per 64 columns, one candidate
in 32 rows), greedy and without log-sum-exp unless it says so, "unprobed" with the best
unprobed cluster's score; the exchange's for 256 keys.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Set before Triton is imported: what is interpreted cannot be compiled.
os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from rich.box import MARKDOWN, SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashhead_kernels import triton_dense, triton_exchange, triton_head
from flashhead_kernels.exchange_layout import padded
from flashhead_kernels.quantize import TILE
from flashhead_kernels.triton_dense_launch import dense_blocks
from flashhead_kernels.triton_shapes import (
    HEAD_WARPS,
    CentroidShape,
    HeadShape,
    part_block,
    power_of_two,
)

MODELS = {
    "Gemma-3-270M": (262144, 640),
    "Llama-3.2-1B": (128256, 2048),
    "Qwen3-1.7B": (151936, 2048),
    "Llama-3.1-8B": (128256, 4096),
}
_GROUPS, _TOKENS, _SCALE_GROUP = 128, 4, 64
_POINTERS = {
    "hidden_ptr": "*bf16", "probe_ptr": "*bf16", "added_ptr": "*fp32", "to_state_ptr": "*fp32",
    "mean_ptr": "*fp32", "coordinates_ptr": "*fp32", "means_ptr": "*fp32",
    "rows_ptr": "*bf16", "ids_ptr": "*i32", "values_ptr": "*i32",
    "scales_ptr": "*bf16", "spread_ptr": "*fp32", "bias_ptr": "*fp32",
    "cluster_bias_ptr": "*fp32", "pinned_rows_ptr": "*bf16", "pinned_ids_ptr": "*i32",
    "pinned_bias_ptr": "*fp32", "positions_ptr": "*i32", "sequences_ptr": "*i32",
    "words_ptr": "*i32", "hidden_scales_ptr": "*fp32", "dots_ptr": "*fp32",
    "keys_ptr": "*i64", "sums_ptr": "*fp32", "counter_ptr": "*i32",
    "counters_ptr": "*i32", "out_keys_ptr": "*i64", "out_logsumexp_ptr": "*fp32",
    "out_ptr": "*i64", "addresses_ptr": "*i64", "epoch_ptr": "*i64",
}  # fmt: skip
_FLOATS = ("alpha", "inverse_temperature", "softcap")
_LOADS = re.compile(
    r"ld\.global[\w.:]*\.(?:v4\.b32|v2\.b64)|cp\.async\.cg\.shared\.global [^;]*0x10"
)
_KERNELS_A_MODEL = 11
_EXCHANGE_RANKS = (2, 4, 8)
_EXCHANGE_KEYS = 256
_TABLE_WIDTH = 130
_STRIDES = ("group_values", "group_scales", "block_words", "block_scales")


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel; bytes but for registers and counts."""

    kernel: str
    shape: str
    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    dp4a: int
    loads_of_16_bytes: int
    fma: int


def compile_kernel(
    function: Any, constants: dict[str, Any], shape: str, warps: int, capability: int
) -> Resources:
    """Compile `function` for `sm_<capability>` and read what it takes off the machine code."""
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else _type(name) for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if (name in _POINTERS or name in _STRIDES)
        and not function.params[place].do_not_specialize_on_alignment
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
    )
    ptx = compiled.asm["ptx"]
    usage = _usage(compiled.asm["cubin"])
    return Resources(
        kernel=function.__name__,
        shape=shape,
        warps=warps,
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        shared_bytes=int(compiled.metadata.shared),
        dp4a=len(re.findall(r"\bdp4a\.", ptx)),
        loads_of_16_bytes=len(_LOADS.findall(ptx)),
        fma=len(re.findall(r"\bfma\.rn", ptx)),
    )


def _type(name: str) -> str:
    if name in _POINTERS:
        return _POINTERS[name]
    return "fp32" if name in _FLOATS else "i64" if name == "seed" else "i32"


def _usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and the rest as cuobjdump, which comes with Triton, prints them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", printed)}


def head_shapes(vocab_size: int, hidden_size: int, k: int = 1) -> tuple[HeadShape, CentroidShape]:
    """Shapes of the default index of such a model."""
    clusters = -(-vocab_size // (_TOKENS * _GROUPS))
    probes = -(-vocab_size // (32 * _TOKENS * _GROUPS))
    groups = hidden_size // _SCALE_GROUP
    words = _SCALE_GROUP // 8
    return HeadShape.of(clusters, _TOKENS, hidden_size, probes, 1, k), CentroidShape(
        bits=4,
        group_size=_SCALE_GROUP,
        groups=groups,
        groups_pad=power_of_two(groups),
        words=words,
        words_pad=power_of_two(words),
        width=4,
        tile=TILE if clusters % TILE == 0 else 1,
        chunk=2 if groups % 2 == 0 else 1,
    )


def every_kernel(models: Sequence[str], capability: int) -> Iterator[Resources]:
    """Compile all head kernels for `models`, and the exchange, which knows no model."""
    options = ("BIAS", "SOFTCAP", "SAMPLE", "SEQUENCES", "LOGSUMEXP")
    plain, whole = dict.fromkeys(options, False), dict.fromkeys((*options, "UNPROBED"), True)
    greedy = plain | {"UNPROBED": False}
    judged = plain | {"UNPROBED": True}
    for model in models:
        vocab_size, hidden_size = MODELS[model]
        for batch, k, flags in ((1, 1, greedy), (8, 1, greedy), (1, 1, judged), (1, 4, whole)):
            head, centroids = head_shapes(vocab_size, hidden_size, k)
            what = f"{model}, batch {batch}" + (", 4 best of all" if flags is whole else "")
            what += ", unprobed" if flags is judged else ""
            parts = {"PART_BLOCK": part_block(_GROUPS, head.best)}
            one = {"HEAD": head, "CENTROIDS": centroids, "BATCH": batch, "BATCH_PAD": batch,
                   "DP4A": True, "PROJECTED": False, **flags, **parts}  # fmt: skip
            yield compile_kernel(triton_head.one_launch_kernel, one, what, HEAD_WARPS, capability)
            if batch == 8:
                dots = {
                    "HEAD": head,
                    "CENTROIDS": centroids,
                    "BLOCK_M": 64,
                    "BATCH": 8,
                    "DP4A": True,
                    "PROJECTED": False,
                }
                yield compile_kernel(triton_head.dots_kernel, dots, what, 4, capability)
            else:
                candidates = {"HEAD": head, **flags, **parts}
                yield compile_kernel(
                    triton_head.candidates_kernel, candidates, what, HEAD_WARPS, capability
                )
        columns = hidden_size * 6 // 10 // _SCALE_GROUP * _SCALE_GROUP
        projection = {"D": hidden_size, "BLOCK_D": 128, "COLUMNS": columns, "BLOCK": 16}
        what = f"{model}, {columns} columns"
        yield compile_kernel(triton_head.project_kernel, projection, what, 4, capability)
        for batch in (1, 8):
            dense = dense_blocks(batch, hidden_size, 1) | plain
            dense |= {"PART_BLOCK": 512, "UPCAST": False, "TABLE": False}
            what = f"{model}, batch {batch}"
            yield compile_kernel(triton_dense.dense_kernel, dense, what, 4, capability)
    for ranks in _EXCHANGE_RANKS:
        exchange = {"TP_SIZE": ranks, "TP_PADDED": padded(ranks), "CAPACITY": _EXCHANGE_KEYS}
        yield compile_kernel(
            triton_exchange.exchange_kernel,
            exchange,
            f"{ranks} ranks",
            triton_exchange.NUM_WARPS,
            capability,
        )


def _print(found: Sequence[Resources], markdown: bool) -> None:
    table = Table(box=MARKDOWN if markdown else SIMPLE)
    for column in Resources.__dataclass_fields__:
        text = column in ("kernel", "shape")
        name = column.replace("_", " ")
        table.add_column(name, justify="left" if text else "right", no_wrap=text)
    for item in found:
        table.add_row(*(str(value) for value in asdict(item).values()))
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a kernel spills that does no more than a greedy step needs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--capability", type=int, default=90, help="sm_N to compile for (90)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON list on stdout")
    output.add_argument("--markdown", action="store_true", help="a Markdown table on stdout")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module="triton.*")
    models = arguments.models
    found = list(
        track(
            every_kernel(models, arguments.capability),
            "compiling",
            total=_KERNELS_A_MODEL * len(models) + len(_EXCHANGE_RANKS),
            console=Console(stderr=True),
            transient=True,
        )
    )
    if arguments.json:
        print(json.dumps([asdict(item) for item in found]))
    else:
        _print(found, arguments.markdown)
    extras = ("all", "unprobed")
    plain = [item for item in found if not any(word in item.shape for word in extras)]
    return 1 if any(item.stack_bytes for item in plain) else 0


if __name__ == "__main__":
    sys.exit(main())
