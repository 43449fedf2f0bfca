"""Triton's compiler for a GPU that is absent."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import triton

from simulated_cuda.commands import Launch, place, tensors_in
from simulated_cuda.runtime import PROCESSORS, SHARED_BYTES


@dataclass
class StubDriver:
    """A driver of Triton that compiles for an absent GPU, and launches nothing.

    launches: all launches. compilations: binaries loaded by kernel, each a specialisation of its
    own, whether compiled or read from Triton's cache.
    """

    capability: int = 90
    launches: list[Launch] = field(default_factory=list)
    compilations: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": SHARED_BYTES, "max_num_regs": 65536, "warpSize": 32,
                "multiprocessor_count": PROCESSORS,
            },
            load_binary=self._load_binary,
            unload_module=lambda *_: None,
        )  # fmt: skip

    def launcher_cls(self, source: object, metadata: Any) -> Callable[..., None]:
        """What launches a kernel: notes that it would."""

        def launch(x: int, y: int, z: int, *args: Any, **_: Any) -> None:
            tensors = [each for each in tensors_in(args) if each.device.type == "cuda"]
            device = tensors[0].device if tensors else None
            current = self.get_current_device()
            self.launches.append(Launch(metadata.name, (x, y, z), current, device, place()))

        return launch

    def _load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and threads, of which Triton checks the last."""
        self.compilations[name] += 1
        return 1, 1, 64, 0, 1024

    def get_current_device(self) -> int:
        return torch.cuda.current_device() if torch.cuda.is_available() else 0

    def set_current_device(self, device: int) -> None:
        torch.cuda.set_device(device)

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", self.get_current_device())

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@contextlib.contextmanager
def stub_driver(capability: int = 90) -> Iterator[StubDriver]:
    """Compile Triton kernels for `sm_<capability>` within the block, and launch nothing.

    TRITON_CACHE_DIR says where compiled kernels are cached.

    Raises:
        RuntimeError: where Triton was imported with TRITON_INTERPRET=1.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=0 before Triton is imported")
    driver = StubDriver(capability)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    try:
        yield driver
    finally:
        triton.runtime.driver._active = before
