"""Which vLLM this is written for: its extension points change between minor versions."""

from __future__ import annotations

import re

OLDEST = (0, 32)
BEFORE = (0, 33)


def unsupported(version: str) -> str | None:
    """One sentence where `version` of vLLM is not one of those supported, else None."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and OLDEST <= (int(found[1]), int(found[2])) < BEFORE:
        return None
    oldest, before = (".".join(map(str, numbers)) for numbers in (OLDEST, BEFORE))
    return (
        f"FlashHead works with vLLM {oldest} up to, but not including, {before}, and this is "
        f"{version}: install one of these, or start without the flashhead option"
    )
