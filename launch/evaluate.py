"""What a head costs in answers: against the dense head, on real hidden states, texts and tasks.

    python launch/evaluate.py fidelity
    python launch/evaluate.py fidelity --texts --csv fidelity.csv
    python launch/evaluate.py fidelity --index runs/my_index --hidden-states states.safetensors
    python launch/evaluate.py sampling
    python launch/evaluate.py likelihood --tokens 20000
    python launch/evaluate.py tasks --data DIR --tasks gsm8k,ifeval --limit 50
    python launch/evaluate.py texts --heads flashhead flashhead_global@runs/published
    python launch/evaluate.py robustness
    python launch/evaluate.py escalation --num-probes 1024 2048 --then 8192 all

`fidelity`: how often a head finds the dense head's token, and the divergence of its distribution
from the dense one, by source with confidence intervals. `sampling`: 200,000 draws at temperatures
0.7 and 1.0 against the dense distribution, at tp 1, 2 and 3. `likelihood`: perplexities under the
closed form and the dense head. `texts`: 100 prompts decoded greedily, the share of texts equal to
the dense head's, and where the others first differ. `tasks`: the same for GSM8K, MATH-500,
MMLU-Pro, IFEval and MT-Bench, with scores and the agreement of final answers. `robustness`: indexes
of synthetic heads with other models' shapes and unusual rows. `escalation`: what a second round of
probes for doubtful rows costs and gains.

Without --index the default index of the model is used, and built where it is missing. All ranks of
--tp-size run in this one process, one after another, with the results of real gloo ranks.

Exit codes: 0, 2 for a mistake in what was given, 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import subcommand

from evaluate_escalation import EscalationCommand
from evaluate_fidelity import FidelityCommand
from evaluate_robustness import RobustnessCommand
from evaluate_sampling import LikelihoodCommand, SamplingCommand
from evaluate_tasks import TasksCommand
from evaluate_texts import TextsCommand
from options import parse, run_command

Command: Any = (
    Annotated[FidelityCommand, subcommand("fidelity")]
    | Annotated[SamplingCommand, subcommand("sampling")]
    | Annotated[LikelihoodCommand, subcommand("likelihood")]
    | Annotated[TasksCommand, subcommand("tasks")]
    | Annotated[TextsCommand, subcommand("texts")]
    | Annotated[RobustnessCommand, subcommand("robustness")]
    | Annotated[EscalationCommand, subcommand("escalation")]
)
"""Each has `run() -> document`, `show(document) -> what to print` and `output`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def work() -> dict[str, Any] | None:
        command = parse(Command, argv, "launch/evaluate.py", __doc__)
        document: dict[str, Any] = command.run()
        if command.output.json:
            return document
        for part in command.show(document):
            Console().print(part, soft_wrap=isinstance(part, str), highlight=False)
        return None

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
