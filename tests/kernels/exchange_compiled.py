"""Compiles the exchange kernel for sm_90, which needs no GPU: `exchange_compiled.py P CAPACITY`.

Prints JSON: `ptx`; `usage`, the line of cuobjdump on registers, stack, shared and local memory; and
`specialised`, arguments whose values would compile another kernel.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashhead_kernels.keys import padded
from flashhead_kernels.triton_exchange import NUM_WARPS, exchange_kernel


def main(tp_size: int, capacity: int) -> None:
    """Compile for `tp_size` ranks and print what came out."""
    pointers = ("keys_ptr", "out_ptr", "ids_ptr", "addresses_ptr", "epoch_ptr")
    constants = {"TP_SIZE": tp_size, "TP_PADDED": padded(tp_size), "CAPACITY": capacity}
    constants["UNPACK"] = True
    signature = (
        dict.fromkeys(pointers, "*i64")
        | {"logits_ptr": "*fp32"}
        | dict.fromkeys(("rank", "num_keys"), "i32")
        | dict.fromkeys(constants, "constexpr")
    )
    compiled = triton.compile(
        ASTSource(fn=exchange_kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": NUM_WARPS},
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        command = [str(tool), "--dump-resource-usage", binary.name]
        dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = next(line for line in dump.splitlines() if "REG:" in line)
    specialised = [
        parameter.name
        for parameter in exchange_kernel.params
        if not parameter.is_constexpr
        and not (parameter.do_not_specialize and parameter.do_not_specialize_on_alignment)
    ]
    answer = {"ptx": compiled.asm["ptx"], "usage": usage.strip(), "specialised": specialised}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
