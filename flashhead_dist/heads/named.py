"""A head as a command line names it: NAME[:PROBES][@DIR]."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashhead_dist.errors import UserError
from flashhead_dist.heads.registry import check_head_names
from flashhead_dist.index import load_manifest


@dataclass(frozen=True)
class NamedHead:
    """A head, its number of probes and its index folder; None for what was not named."""

    name: str
    num_probes: int | None = None
    index: Path | None = None

    @property
    def label(self) -> str:
        """As it was named."""
        probes = "" if self.num_probes is None else f":{self.num_probes}"
        return f"{self.name}{probes}" + ("" if self.index is None else f"@{self.index}")


def named_head(text: str) -> NamedHead:
    """What NAME[:PROBES][@DIR] names.

    Raises:
        UserError: an unknown name, probes that are no number of 1 or more, a folder without an
            index.
    """
    named, _, folder = text.partition("@")
    name, _, probes = named.partition(":")
    check_head_names([name])
    if probes and not (probes.isdecimal() and int(probes)):
        raise UserError(f"{probes!r} in {text} is no number of probes: give NAME:PROBES@DIR")
    if folder:
        load_manifest(Path(folder))
    return NamedHead(name, int(probes) if probes else None, Path(folder) if folder else None)
