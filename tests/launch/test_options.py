"""Command lines as dataclasses: flags, defaults, ranges, and mistakes in one sentence."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from flashhead_dist.errors import UserError
from options import (
    Checked,
    Device,
    EscalationOptions,
    Integers,
    JsonOutput,
    ModelWithStates,
    Names,
    Positive,
    Range,
    Seconds,
    Switch,
    Value,
    parse,
    run_command,
    values,
)

_EXCLUSIVE = tyro.conf.create_mutex_group(required=False)


@dataclass(kw_only=True)
class Measurement(Checked):
    """How to measure."""

    iters: Positive[int] = 40
    """timed iterations of a cell"""
    cell_seconds: Seconds[float] = 12.0
    """time limit"""
    batch_sizes: Annotated[Integers[list[int]], Range(1)] = field(default_factory=lambda: [1, 4])
    """rows of a step"""
    heads: Names[list[str] | None] = None
    """heads (default: all)"""
    device: Device[str | None] = None
    """where heads run"""
    skip_plots: Switch = False
    """draw nothing"""
    temperatures: Value[list[float]] = field(default_factory=lambda: [0.7, 1.0])
    """of draws"""
    prompt: Annotated[str | None, _EXCLUSIVE] = None
    """a prompt"""
    prompts: Annotated[Path | None, _EXCLUSIVE] = None
    """a file of prompts"""


@dataclass(kw_only=True)
class Options:
    """Of a script."""

    model: ModelWithStates
    measurement: Measurement
    escalation: EscalationOptions
    output: JsonOutput


def read(line: str = "", *, speaks: bool = True) -> Options:
    return parse(Options, line.split(), "launch/x.py", "What the script does.", speaks=speaks)


def test_flags_are_read_into_groups() -> None:
    options = read(
        "--model DIR --synthetic 32,8 --index i --batch-sizes 4,1 --heads a,b --device cpu "
        "--skip-plots --temperatures 0.5 2 --json --escalate-below=-3"
    )
    assert options.model == ModelWithStates(model="DIR", synthetic="32,8", index=Path("i"))
    assert options.measurement == Measurement(
        batch_sizes=[4, 1], heads=["a", "b"], device="cpu", skip_plots=True, temperatures=[0.5, 2]
    )
    assert options.escalation.escalate_below == -3
    assert options.output.json


def test_defaults_come_from_the_fields() -> None:
    options = read()
    assert options.measurement == Measurement()
    assert values(options)["batch_sizes"] == [1, 4]
    assert {"model", "iters", "escalate_to", "json"} <= values(options).keys()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--iters 0", "--iters is 0: give 1 or more"),
        ("--iters x", "--iters"),
        ("--iters", "--iters"),
        ("--cell-seconds 0", "more than 0"),
        ("--cell-seconds inf", "finite"),
        ("--cell-seconds nan", "finite"),
        ("--batch-sizes 1,0", "--batch-sizes is 0"),
        ("--batch-sizes 1,x", "'x' is not an integer"),
        ("--device tpu", "('cpu', 'cuda')"),
        ("--iter 3", "Unrecognized options: --iter"),
        ("--prompt a --prompts b", "--prompt and --prompts"),
        ("--escalate-to 3", "--escalate-below"),
        ("--escalate-below nan", "finite"),
    ],
)
def test_a_mistake_names_the_flag(words: str, named: str) -> None:
    with pytest.raises(UserError) as mistake:
        read(words)
    assert named in str(mistake.value)
    assert "\n" not in str(mistake.value)


def test_every_rank_raises_and_one_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError):
        read("--unknown", speaks=False)
    with pytest.raises(SystemExit) as end:
        read("--help", speaks=False)
    assert (end.value.code or 0, *capsys.readouterr()) == (0, "", "")
    with pytest.raises(SystemExit):
        read("--help")
    shown = capsys.readouterr().out
    assert "What the script does." in shown
    assert "timed iterations of a cell (default: 40)" in shown


def test_escalation_is_for_runs_with_its_head() -> None:
    threshold = EscalationOptions(escalate_below=0.5, escalate_to=8)
    found = threshold.threshold(["flashhead_escalate"])
    assert found is not None
    assert (found.margin, found.num_probes) == (0.5, 8)
    assert EscalationOptions().threshold(["flashhead"]) is None
    with pytest.raises(UserError):
        threshold.threshold(["flashhead"])


def test_a_command_ends_with_a_code_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise UserError("no such file: name another")

    def stop() -> None:
        raise KeyboardInterrupt

    assert run_command(lambda: {"a": 1}) == 0
    assert run_command(lambda: None) == 0
    assert capsys.readouterr().out == '{"a": 1}\n'
    assert run_command(refuse) == 2
    assert capsys.readouterr().err == "error: no such file: name another\n"
    assert run_command(stop) == 130
