"""Reading a command line on every rank of a job: one speaks, and a mistake ends all in order."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

import torch

from flashhead_dist.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class RankParser(argparse.ArgumentParser):
    """Raises UserError where argparse exits, and is silent on all ranks but one."""

    def __init__(self, script: str, *, speaks: bool, **options: Any) -> None:
        """script: by what name the help is found; options: argparse's."""
        # A flag that is a prefix of one of torchrun's own would be taken by torchrun.
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )
        self._script, self._speaks = script, speaks

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self._script} --help lists what can be given")

    def print_help(self, file: Any = None) -> None:
        if self._speaks:
            super().print_help(file)


def integers(text: str) -> list[int]:
    """Comma-separated integers, as they come."""
    return [int(number) for number in text.split(",")]


integers.__name__ = "comma-separated integers"  # argparse names it so where it fails
