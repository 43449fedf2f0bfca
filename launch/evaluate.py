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

`fidelity` says how often a head finds the dense head's token, and how far its distribution is from
the dense one, by source with confidence intervals; `sampling` holds 200,000 draws at temperatures
0.7 and 1.0 against the dense distribution, and draws them at tp 1, 2 and 3; `likelihood` compares
perplexities under the closed form and the dense head; `texts` decodes 100 prompts greedily and says
how many texts are the dense head's own, and where the others first differ; `tasks` does so for
GSM8K, MATH-500, MMLU-Pro, IFEval and MT-Bench, with scores and the agreement of final answers;
`robustness` builds indexes of made-up heads: other models' shapes, odd rows; `escalation` says what
a second look at doubtful rows costs and gains.

Without --index the default index of the model is used, and built where it is missing. All ranks of
--tp-size run in this one process, one after another, and give what real gloo ranks give.

Exit codes: 0, 2 for a mistake in what was given, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from types import ModuleType

import evaluate_escalation
import evaluate_fidelity
import evaluate_robustness
import evaluate_sampling
import evaluate_tasks
import evaluate_texts
from flashhead_dist.errors import INTERRUPTED, UserError

_MODULES: tuple[ModuleType, ...] = (
    evaluate_fidelity,
    evaluate_sampling,
    evaluate_tasks,
    evaluate_texts,
    evaluate_robustness,
    evaluate_escalation,
)
"""Each has COMMANDS, `add_commands(subparsers)`, `run(arguments) -> document`, `show(document)`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    module = next(module for module in _MODULES if arguments.command in module.COMMANDS)
    try:
        document = module.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nerror: interrupted.", file=sys.stderr)
        return INTERRUPTED
    if arguments.json:
        print(json.dumps(document))
    else:
        module.show(document)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for module in _MODULES:
        module.add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
