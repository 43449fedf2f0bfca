"""Decode text with a retrieval head or a dense one, on any layout of ranks, and measure it.

TTFT is the time from a prompt to its first token, TPOT the time a token after that; medians and
90th percentiles are over batches of prompts. With --compare the heads take turns batch by batch, in
one run, and ratios are of medians. The text of --lossless N is the dense head's, token for token.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashhead_dist.bench.control import Control
from flashhead_dist.bench.crossover import find_crossover_of
from flashhead_dist.bench.environment import Setup, decide_setup
from flashhead_dist.decode.compare import Measured, Request, TextLog, compare, warm_up
from flashhead_dist.decode.engine import Engine, Traffic, Variant, count_traffic
from flashhead_dist.decode.prompts import read_prompts
from flashhead_dist.decode.sequences import DecodeState
from flashhead_dist.errors import UserError
from flashhead_dist.heads.flashhead import FlashHeadAuto
from flashhead_dist.heads.registry import needs_index
from flashhead_dist.index import ensure_index
from flashhead_dist.models import ModelSource, open_model
from flashhead_dist.progress import progress
from flashhead_dist.report.generation import (
    generation_document,
    generation_notes,
    generation_table,
    stream_text,
)
from flashhead_dist.report.tables import report_console
from flashhead_kernels.cpu_threads import compute_threads
from flashhead_topology.probe import probe_machine
from generate_arguments import parse_arguments
from rank_parser import DTYPES
from ranks import Ranks, World, refuse_together, run_ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Decode on this rank; returns the exit code."""
    world = World()
    try:
        arguments = parse_arguments(
            argv, description=__doc__, world_size=world.size, speaks=world.rank == 0
        )
    except UserError as error:
        return refuse_together(world, error)
    run = _Run(arguments, world)
    return run_ranks(world, run.decode, run.parting_words)


class _Run:
    """One rank of a run, from ranks that have met to a printed table."""

    def __init__(self, arguments: argparse.Namespace, world: World) -> None:
        self.arguments, self.world = arguments, world
        self.log: TextLog | None = None

    def parting_words(self) -> str:
        """Where the text is, of a run that was ended."""
        return " No text was produced yet." if self.log is None else self.log.save_interrupted()

    def decode(self, ranks: Ranks) -> None:
        """Do it all; raises PeerError on every rank, if a user's mistake shows on one."""
        arguments, control = self.arguments, ranks.control
        prompts: list[str] = []
        with control.phase():
            setup = self._decide()
            if control.is_first:
                prompts = self._prompts()
        prompts = control.broadcast(prompts)
        index = self._prepare(control)
        with control.phase():
            model = open_model(arguments.model, progress=False)
        ranks.open_group(setup.placement.backend, setup.device)
        with compute_threads(setup.threads_per_rank):
            self._run(self._engine(model, index, setup), prompts, control, setup)

    def _run(self, engine: Engine, prompts: Sequence[str], control: Control, setup: Setup) -> None:
        with progress("starting", total=2, visible=control.is_first) as advance:
            advance.stage(f"loading {engine.model.name}")
            with control.phase():
                engine.load()
            with control.phase():
                request = self._request(engine, prompts)
                log_path = self.arguments.out if control.is_first else None
                self.log = TextLog(engine.tokenizer, log_path)
            self._change_over(engine, control, request.batch_size)
            advance.stage("warming up")
            warm_up(engine, self.arguments.variants, request)
        measured, traffic = self._measure(engine, request, prompts, control)
        # Only ranks of the last stage know what the head took.
        everywhere = control.gather([_times_of(item) for item in measured])
        for item, times in zip(measured, everywhere[engine.layout.head_ranks[0]], strict=True):
            vars(item).update(times)
        if control.is_first:
            notes = [*setup.notes, *_oversubscription(setup, self.world)]
            self._report(engine, measured, traffic, notes)

    def _decide(self) -> Setup:
        machine = probe_machine()
        threads = self.arguments.threads_per_rank
        return decide_setup(
            machine,
            local_rank=self.world.local_rank,
            local_world_size=self.world.local_size,
            threads_per_rank=threads or max(1, machine.num_cores // self.world.local_size),
            device=self.arguments.device,
            heads=self.arguments.heads,
        )

    def _prompts(self) -> list[str]:
        if self.arguments.prompt is not None:
            return [self.arguments.prompt]
        return read_prompts(self.arguments.prompts)

    def _prepare(self, control: Control) -> Path | None:
        """The index's folder, built by the first rank where it is missing and needed."""
        arguments = self.arguments
        if arguments.index is not None:
            return Path(arguments.index)
        made: str | None = None
        with control.phase():
            if control.is_first and any(needs_index(v.head) for v in arguments.variants):
                made = str(ensure_index(open_model(arguments.model, progress=True)))
        made = control.broadcast(made)
        return None if made is None else Path(made)

    def _engine(self, model: ModelSource, index: Path | None, setup: Setup) -> Engine:
        arguments = self.arguments
        return Engine(
            model=model,
            index_dir=index,
            variants=arguments.variants,
            layout=arguments.layout,
            dtype=DTYPES[arguments.dtype],
            device=setup.device,
            parameters=arguments.parameters,
            num_probes=arguments.num_probes,
            escalation=arguments.escalation,
            layers_per_stage=arguments.layers_per_stage,
        )

    def _request(self, engine: Engine, prompts: Sequence[str]) -> Request:
        arguments = self.arguments
        request = Request(
            prompts=[engine.tokenizer(prompt).input_ids for prompt in prompts],
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size,
            in_flight=arguments.micro_batches,
            stop_token_ids=frozenset() if arguments.ignore_eos else engine.stop_token_ids,
            pad_token_id=engine.pad_token_id,
        )
        request.check(engine.model.vocab_size, engine.context_length)
        return request

    def _change_over(self, engine: Engine, control: Control, largest: int) -> None:
        """Let flashhead_auto scan where launch/scale.py has measured that it should."""
        head = engine.head(FlashHeadAuto.name)
        if isinstance(head, FlashHeadAuto):
            ranks = control.among(engine.layout.head_ranks, "head")
            found = find_crossover_of(head, ranks, largest=largest)
            head.changes_at = () if found is None else found.changes_at

    def _measure(
        self, engine: Engine, request: Request, prompts: Sequence[str], control: Control
    ) -> tuple[list[Measured], dict[str, Traffic]]:
        arguments, log = self.arguments, self.log
        assert log is not None
        variants = arguments.variants
        streams = len(variants) == 1 and not arguments.json and control.is_first
        span = request.batch_size * request.in_flight
        num_runs = len(variants) * -(-len(prompts) // span)
        shown = progress("starting", total=num_runs, visible=control.is_first and not streams)

        def begin(
            variant: Variant, states: list[DecodeState], first: int
        ) -> Callable[[int], None] | None:
            log.begin(variant, states, first)
            advance.stage(f"{variant.label}, prompt {first + 1} of {len(prompts)}")
            return stream_text(engine.tokenizer, prompts, states, first) if streams else None

        measured = [Measured(variant) for variant in variants]
        with shown as advance:
            for _ in compare(engine, measured, request, on_states=begin):
                log.end()
        traffic: dict[str, Traffic] = {}
        if arguments.tp_size > 1 and arguments.pp_size == 1:
            traffic = count_traffic(engine, variants, list(request.prompts[0]))
        return measured, traffic

    def _report(
        self,
        engine: Engine,
        measured: Sequence[Measured],
        traffic: dict[str, Traffic],
        notes: Sequence[str],
    ) -> None:
        console = report_console()
        console.print()
        console.print(generation_table(measured))
        for note in [*generation_notes(measured, traffic), *notes]:
            console.print(f"- {note}", markup=False, highlight=False, soft_wrap=True)
        if self.arguments.json:
            texts = {
                item.variant.label: [
                    engine.tokenizer.decode(tokens, skip_special_tokens=True)
                    for tokens in item.tokens
                ]
                for item in measured
            }
            document = generation_document(measured, texts, traffic) | {"notes": list(notes)}
            print(json.dumps(document, allow_nan=False), flush=True)


def _oversubscription(setup: Setup, world: World) -> list[str]:
    if not setup.fit(world.local_size).oversubscribed:
        return []
    return [
        f"OVERSUBSCRIBED: {world.local_size} ranks with {setup.threads_per_rank} threads each on "
        f"{setup.machine.num_cores} cores take turns, so times here say nothing about speed; texts "
        f"and bytes are not concerned."
    ]


def _times_of(item: Measured) -> dict[str, Any]:
    """What a rank's clock measured."""
    names = ("ttft_s", "tpot_s", "run_s", "head_s", "check_s")
    return {name: getattr(item, name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
