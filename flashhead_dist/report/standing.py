"""The drawings of what a run stands on, in the run's folder."""

from __future__ import annotations

from pathlib import Path

from flashhead_dist.bench.records import cannot_write
from flashhead_topology.choices import Choice, all_choices
from flashhead_topology.drawing import short_drawing, text_drawing
from flashhead_topology.picture import write_picture
from flashhead_topology.place import Topology
from flashhead_topology.systems import list_systems

TEXT_NAME = "topology.txt"
PICTURE_NAME = "topology.png"


def write_standing(topology: Topology, folder: Path, *, picture: bool) -> list[Path]:
    """Write the text and, where asked for, the picture; return their paths.

    Raises:
        UserError: the folder cannot be written.
    """
    choices = all_choices(topology, list_systems())
    reasons = "\n".join(map(_sentence, choices))
    paths = [folder / TEXT_NAME]
    try:
        paths[0].write_text(
            f"{short_drawing(topology)}\n\n{text_drawing(topology)}\n{reasons}\n", encoding="utf-8"
        )
        if picture:
            paths.append(folder / PICTURE_NAME)
            write_picture(topology, paths[-1])
    except OSError as error:
        raise cannot_write(paths[-1], error) from error
    return paths


def _sentence(choice: Choice) -> str:
    if choice.value is None:
        return f"{choice.name}: {choice.reason}"
    value = choice.value
    if choice.name == "parallelism":
        value = "tp {} x pp {}".format(*value)
    return f"{choice.name}: {value} ({choice.reason})"
