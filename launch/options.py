"""Options of the scripts in this folder: types of values, what several scripts share, and `parse`.

A script declares its options as dataclasses and reads them in one call:

    @dataclass(kw_only=True)
    class Measurement(Checked):
        "How to measure."

        iters: Positive[int] = 40
        '''timed iterations'''                  # the docstring of a field is its help

    @dataclass(kw_only=True)
    class CostOptions:
        model: SyntheticModel                   # a group of flags: --model, --synthetic
        measurement: Measurement                # --iters
        output: JsonOutput                      # --json

    options = parse(CostOptions, argv, "launch/cost.py", __doc__)     # options.measurement.iters

Flags are named after the innermost fields, with hyphens; `tyro.conf.arg(name=...)` renames one. A
field with a default of None is a flag that may be left out. A class that derives from `Checked`
refuses values outside of the range that a field's type names (`Positive`, `NonNegative`, ...), and
may add checks in its own `__post_init__` (call super's); raise UserError there. Where flags exclude
each other, annotate them with one `tyro.conf.create_mutex_group(required=False)`. Subcommands are a
union of dataclasses, see evaluate.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, fields, is_dataclass
from io import StringIO
from math import inf, isfinite
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import pandas as pd
import torch
import tyro
from rich.table import Table
from rich.text import Text
from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from flashhead_dist.errors import INTERRUPTED, UserError
from flashhead_dist.heads.flashhead_escalate import Escalation, FlashHeadEscalate
from flashhead_dist.heads.registry import check_head_names, needs_index
from flashhead_dist.index import ensure_index
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.states import (
    HiddenStates,
    collect_hidden_states,
    load_hidden_states,
    require_hidden_size,
    synthetic_hidden_states,
)
from flashhead_topology.probe import probe_machine

T = TypeVar("T")
OptionsT = TypeVar("OptionsT")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Range:
    """Values that a field takes, inclusive of `least`; `above` excludes it."""

    least: float
    most: float = inf
    above: bool = False

    def refuse(self, flag: str, value: float) -> None:
        """Raise UserError for a value outside of the range."""
        if value < self.least or value > self.most or (self.above and value == self.least):
            need = f"more than {self.least:g}" if self.above else f"{self.least:g} or more"
            most = "" if self.most == inf else f", at most {self.most:g}"
            raise UserError(f"{flag} is {value}: give {need}{most}")
        if not isfinite(value):
            raise UserError(f"{flag} is {value}: give a finite number")


def _default(value: str) -> str:
    """What the help says after a field's own text: a default of None is described by that text."""
    return "" if value in ("None", "''", "False", "True") else f"(default: {value})"


def _list_of(item: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec[Any]:
    """A comma-separated list as one word."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: [item(word.strip()) for word in words[0].split(",")],
        is_instance=lambda value: value is None or isinstance(value, list | tuple),
        str_from_instance=lambda value: [",".join(map(str, value or []))],
    )


def _integer(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"{word!r} is not an integer") from None


def one_of(names: Sequence[str]) -> PrimitiveConstructorSpec[Any]:
    """A value that is one of `names`; annotate a field of type str or str | None with it."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(names)}}}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value is None or value in names,
        str_from_instance=lambda value: [str(value)],
        choices=tuple(names),
    )


Value = Annotated[T, arg(help_behavior_hint=_default)]
"""Any type of value; use it for fields whose default is None."""
Count = Annotated[T, arg(metavar="N", help_behavior_hint=_default)]
Positive = Annotated[Count[T], Range(1)]
NonNegative = Annotated[Count[T], Range(0)]
Number = Annotated[T, arg(metavar="X", help_behavior_hint=_default)]
Seconds = Annotated[T, arg(metavar="S", help_behavior_hint=_default), Range(0, above=True)]
Folder = Annotated[T, arg(metavar="DIR", help_behavior_hint=_default)]
File = Annotated[T, arg(metavar="FILE", help_behavior_hint=_default)]
Device = Annotated[T, one_of(("cpu", "cuda")), arg(help_behavior_hint=_default)]
DType = Annotated[T, one_of(sorted(DTYPES)), arg(help_behavior_hint=_default)]
Integers = Annotated[T, _list_of(_integer, "N,N"), arg(help_behavior_hint=_default)]
"""Comma-separated integers in the order given."""
Names = Annotated[T, _list_of(str, "A,B"), arg(help_behavior_hint=_default)]
"""Comma-separated names in the order given."""
Switch = tyro.conf.FlagCreatePairsOff[Annotated[bool, arg(help_behavior_hint="")]]
"""A flag that takes no value."""


class Checked:
    """Base of a dataclass of options: refuses values outside of the ranges of its fields' types."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for allowed in getattr(hint, "__metadata__", ()):
                if isinstance(allowed, Range) and value is not None:
                    for item in value if isinstance(value, list) else [value]:
                        allowed.refuse(flag_of(name), item)


@dataclass(kw_only=True)
class ModelOptions(Checked):
    """The model."""

    model: Value[str | None] = None
    """HF folder, .gguf file or hub id (default: built in)"""

    def open(self, *, progress: bool = True) -> ModelSource:
        """Read the model's description; raises UserError where there is no such model."""
        return open_model(self.model, progress=progress)


@dataclass(kw_only=True)
class IndexedModel(ModelOptions):
    """The model and its index."""

    index: Folder[Path | None] = None
    """index folder (default: the model's own, cached; built where it is missing)"""

    def index_folder(
        self, model: ModelSource, heads: Sequence[str] = ("flashhead",)
    ) -> Path | None:
        """The index, built where it is missing; None where none of the heads needs one."""
        if self.index is None and any(map(needs_index, heads)):
            return ensure_index(model)
        return self.index


@dataclass(kw_only=True)
class SyntheticModel(ModelOptions):
    """The model, or a synthetic one."""

    synthetic: Annotated[str | None, arg(metavar="V,D", help_behavior_hint=_default)] = None
    """a random embedding of this shape, marked as synthetic in every output"""

    def open(self, *, progress: bool = True) -> ModelSource:
        """Read the model's description; raises UserError where there is no such model."""
        return open_model(self.model, synthetic=self.synthetic, progress=progress)

    def collected_states(self, model: ModelSource) -> tuple[HiddenStates, HiddenStates]:
        """Calibration and test states of the shipped corpus, or synthetic ones."""
        collect = synthetic_hidden_states if model.synthetic else collect_hidden_states
        return collect(model)


@dataclass(kw_only=True)
class IndexedSyntheticModel(SyntheticModel, IndexedModel):
    """The model, or a synthetic one, and its index."""


@dataclass(kw_only=True)
class ModelWithStates(IndexedSyntheticModel):
    """The model, or a synthetic one, its index, and test states."""

    hidden_states: File[Path | None] = None
    """safetensors file of test states [N, D] (default: of the shipped corpus)"""

    def test_states(self, model: ModelSource) -> HiddenStates:
        """The states of the file, or else of the corpus.

        Raises:
            UserError: a file that is unreadable or of another hidden size.
        """
        if self.hidden_states is None:
            return self.collected_states(model)[1]
        states = load_hidden_states(self.hidden_states)
        require_hidden_size(states, model.hidden_size, model.name)
        return states


@dataclass(kw_only=True)
class EscalationOptions(Checked):
    """The threshold of flashhead_escalate: which rows take a second round of probes."""

    escalate_below: Annotated[
        float | None, arg(metavar="LOGITS", help_behavior_hint=_default), Range(-inf)
    ] = None
    """rows whose best candidate's logit leads the best unprobed cluster's score by less; 0 is
    cautious, 1e9 takes every row (default: the index's own)"""
    escalate_to: Positive[int | None] = None
    """clusters probed in the second round (default with --escalate-below: every token)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.escalate_below is None and self.escalate_to is not None:
            raise UserError(
                f"--escalate-to {self.escalate_to} needs a threshold: give --escalate-below too"
            )

    def threshold(self, heads: Sequence[str] | None) -> Escalation | None:
        """The threshold given; None for the index's own. heads: those of the run, None for all.

        Raises:
            UserError: no head of the run uses it.
        """
        if self.escalate_below is None:
            return None
        if heads is not None and FlashHeadEscalate.name not in heads:
            raise UserError(
                f"--escalate-below is for {FlashHeadEscalate.name}, which is not among "
                f"{', '.join(heads)}: name it as well, or leave the option out"
            )
        return Escalation(margin=self.escalate_below, num_probes=self.escalate_to)


@dataclass(kw_only=True)
class ThreadOptions(Checked):
    """Threads of this process."""

    threads: Positive[int | None] = None
    """threads (default: all cores)"""

    @property
    def count(self) -> int:
        """The number given, or the number of cores."""
        return self.threads or probe_machine().num_cores


@dataclass(kw_only=True)
class JsonOutput(Checked):
    """What to write."""

    json: Switch = False
    """print one JSON document as the last line"""


@dataclass(kw_only=True)
class TableOutput(JsonOutput):
    """What to write."""

    csv: File[Path | None] = None
    """write the table there as CSV"""

    def write_csv(self, rows: Sequence[Mapping[str, Any]], *, float_format: str = "%.6g") -> None:
        """Write rows, nested keys joined by dots, where --csv names a file; raises UserError."""
        if self.csv is None:
            return
        try:
            self.csv.parent.mkdir(parents=True, exist_ok=True)
            table = pd.json_normalize([dict(row) for row in rows])
            table.to_csv(self.csv, index=False, float_format=float_format or None)
        except OSError as error:
            raise UserError(
                f"{self.csv} cannot be written ({error.strerror}): name another --csv"
            ) from error


def text_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    caption: str | None = None,
) -> Table:
    """A table for the terminal: its first column is aligned left, all others right."""
    table = Table(title=title, caption=caption)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def available_device(name: str | None) -> torch.device:
    """The device of that name; None takes a GPU where there is one. Raises UserError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name} is unknown: give cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
        return device
    if device.type != "cpu":
        raise UserError(f"--device {name} is unavailable here: give cpu, or leave it out")
    return device


def head_names(names: Sequence[str]) -> list[str]:
    """The heads of a comma-separated list, each once; raises UserError for an unknown name."""
    check_head_names(list(names))
    if not names:
        raise UserError("the list of heads is empty: name at least one")
    return list(dict.fromkeys(names))


def flag_of(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def values(options: Any) -> dict[str, Any]:
    """All options of nested dataclasses by the names of their innermost fields."""
    found: dict[str, Any] = {}
    for field in fields(options):
        value = getattr(options, field.name)
        found |= values(value) if is_dataclass(value) else {field.name: value}
    return found


def parse(
    options: type[OptionsT],
    argv: Sequence[str] | None,
    script: str,
    description: str | None,
    *,
    speaks: bool = True,
) -> OptionsT:
    """Read a command line into a dataclass of options, or a union of them (subcommands).

    Args:
        options: the dataclass.
        argv: words of the command line; None takes those of this process.
        script: how the user calls it, such as launch/cost.py.
        description: what --help shows above the options.
        speaks: whether this rank prints the help.

    Raises:
        UserError: the command line has a mistake; every rank of a job raises it.
        SystemExit: after --help, with 0.
    """
    errors = StringIO()
    try:
        with redirect_stderr(errors):
            return tyro.cli(
                options,
                args=argv,
                prog=script,
                description=description,
                console_outputs=speaks,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
            )
    except SystemExit as end:
        if not end.code:
            raise
    mistake = _first_sentence(errors.getvalue()) or "the command line has a mistake"
    raise UserError(f"{mistake}; {script} --help lists the options")


def run_command(work: Callable[[], dict[str, Any] | None], *, interrupted: str = "") -> int:
    """Do a script's work in one process and return its exit code.

    Prints the document that the work returns as one line of JSON, or a UserError as one sentence.

    interrupted: what to add to the message after Ctrl-C.
    """
    try:
        document = work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\nerror: interrupted{interrupted}.", file=sys.stderr)
        return INTERRUPTED
    if document is not None:
        print(json.dumps(document))
    return 0


def _first_sentence(box: str) -> str:
    """The message within the box that tyro draws: what stands between its title and a rule."""
    lines = [line.strip("│ ") for line in Text.from_ansi(box).plain.splitlines()[1:]]
    rules = [number for number, line in enumerate(lines) if line[:1] in ("─", "╰", "")]
    text = " ".join(lines[: rules[0]] if rules else lines)
    return text.removeprefix("Error parsing ").rstrip(".!")
