"""An OpenAI server of vLLM as a child: started, waited for, frozen, ended with all its processes.

Nothing of vLLM is imported: the server runs under whatever Python has it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import psutil

from flashhead_dist.errors import UserError

HOST = "127.0.0.1"
SERVED_NAME = "model"
"""The model's name in requests."""

_LAST_LINES = 12
_POLL_S = 0.5
_END_S = 60.0


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How to start a server.

    python: the interpreter of vLLM's environment. model: a Hugging Face folder. flashhead: the
    plugin's options; False to switch it off, None to say nothing of it. cores: those of the
    machine, dealt over the ranks on a CPU. more: further arguments of the server. environment:
    further environment variables.
    """

    python: Path
    model: Path
    tp_size: int = 1
    flashhead: Mapping[str, Any] | Literal[False] | None = None
    dtype: str = "bfloat16"
    device: str = "cpu"
    cores: int = 1
    kv_cache_mb: int = 1024
    max_model_len: int = 2048
    more: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self, port: int) -> list[str]:
        """The server's command line."""
        found = [
            str(self.python), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(self.model), "--served-model-name", SERVED_NAME,
            "--host", HOST, "--port", str(port),
            "--tensor-parallel-size", str(self.tp_size), "--dtype", self.dtype,
            "--max-model-len", str(self.max_model_len), "--disable-uvicorn-access-log",
        ]  # fmt: skip
        if self.device == "cpu":
            # On a GPU vLLM takes what is left.
            found += ["--kv-cache-memory-bytes", str(self.kv_cache_mb << 20)]
        if self.flashhead is not None:
            asked = dict(self.flashhead) if self.flashhead else False
            found += ["--additional-config", json.dumps({"flashhead": asked})]
        return [*found, *self.more]

    def variables(self) -> dict[str, str]:
        """The server's whole environment."""
        found = {
            # The number of threads follows from a rank's cores, not from what make exports.
            name: value
            for name, value in os.environ.items()
            if name != "OMP_NUM_THREADS"
        } | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if self.device == "cpu":
            found["VLLM_CPU_OMP_THREADS_BIND"] = bind_threads(self.cores, self.tp_size)
        return found | dict(self.environment)


def bind_threads(cores: int, tp_size: int) -> str:
    """`VLLM_CPU_OMP_THREADS_BIND`: cores 0 to `cores - 1` in runs of equal length, one a rank."""
    each = max(1, cores // tp_size)
    runs = [(rank * each % cores, rank * each % cores + each - 1) for rank in range(tp_size)]
    return "|".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


class Server:
    """A running server; a context manager that leaves no process behind.

    log: the file of what it prints. Call `wait_ready` before the first request.
    """

    def __init__(self, options: ServerOptions, log: Path) -> None:
        self.options, self.log = options, log
        self.port = free_port()
        self._frozen = False
        self._ready = False
        with log.open("wb") as file:
            self._child = subprocess.Popen(
                options.command(self.port),
                env=options.variables(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # A group of its own: Ctrl-C is ours to pass on, and all of it can be signalled.
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        """Where it answers, without a path."""
        return f"http://{HOST}:{self.port}"

    @property
    def returncode(self) -> int | None:
        """Of the API server's process; None while it runs."""
        return self._child.poll()

    def wait_ready(
        self, timeout_s: float = 1800.0, while_waiting: Callable[[], None] | None = None
    ) -> None:
        """Return once the server is healthy.

        while_waiting: called twice a second.

        Raises:
            UserError: it ended, or was not ready in time; the text has its last lines.
        """
        end_s = time.monotonic() + timeout_s
        while not self._is_healthy():
            if self._child.poll() is not None:
                raise UserError(self._what_it_said(f"ended with code {self._child.returncode}"))
            if time.monotonic() > end_s:
                raise UserError(self._what_it_said(f"was not ready within {timeout_s:.0f} s"))
            if while_waiting is not None:
                while_waiting()
            time.sleep(_POLL_S)
        self._ready = True

    def processes(self) -> list[psutil.Process]:
        """The API server and everything it started, engine and workers included."""
        try:
            own = psutil.Process(self._child.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def freeze(self) -> None:
        """Stop all its processes where they are, so that they take nothing from another server."""
        self._signal_group(signal.SIGSTOP)
        self._frozen = True

    def thaw(self) -> None:
        """Let them go on."""
        self._signal_group(signal.SIGCONT)
        self._frozen = False

    def stop(self) -> int | None:
        """End it, by SIGKILL where SIGTERM does not within a minute; returns its code."""
        if self._frozen:
            self.thaw()
        everyone = self.processes()
        if self._child.poll() is None:
            self._child.terminate()
            try:
                # While it still starts there is nothing to be finished, and it may not listen.
                self._child.wait(timeout=_END_S if self._ready else 5.0)
            except subprocess.TimeoutExpired:
                everyone = self.processes()
                for process in everyone:
                    _kill(process)
                self._child.wait()
        _, alive = psutil.wait_procs(everyone, timeout=10.0)
        for process in alive:
            _kill(process)
        _, alive = psutil.wait_procs(alive, timeout=10.0)
        for process in alive:
            process.kill()
        return self._child.returncode

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _signal_group(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._child.pid, number)
        except ProcessLookupError:
            return

    def _what_it_said(self, happened: str) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = "\n  ".join(lines[-_LAST_LINES:]) or "nothing"
        return f"vLLM's server {happened}; {self.log} has what it said, at the end:\n  {last}"


def _kill(process: psutil.Process) -> None:
    """Kill it, unless it is what removes the shared memory of the others once they are gone."""
    try:
        if "resource_tracker" not in " ".join(process.cmdline()):
            process.kill()
    except psutil.NoSuchProcess:
        return


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])
