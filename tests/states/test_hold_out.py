"""Held-out texts: chosen by rule, and never among what calibrates or chooses."""

from __future__ import annotations

import pytest
import torch

from flashhead_dist.errors import UserError
from flashhead_dist.states import HiddenStates
from flashhead_dist.states.split import (
    Document,
    HoldOut,
    choose_hold_out,
    divide,
    parse_hold_out,
    set_aside,
    shipped_texts,
)

DOCUMENTS = [
    Document("fr", "a", "t", "passages", "Latin"),
    Document("de", "b", "t", "passages", "Latin"),
    Document("ja", "c", "t", "passages", "Japanese"),
    Document("en", "d", "t", "passages", "Latin"),
    Document("en", "e", "t", "questions", "Latin"),
    Document("mathematics", "f", "t", "problems", "Latin"),
]


def states_of(documents: list[int]) -> HiddenStates:
    sources = tuple(sorted({d.source for d in DOCUMENTS}))
    return HiddenStates(
        states=torch.tensor(documents, dtype=torch.float32).unsqueeze(1),
        source_ids=torch.tensor([sources.index(DOCUMENTS[d].source) for d in documents]),
        sources=sources,
        origin="made up",
        documents=torch.tensor(documents),
    )


def test_one_language_of_a_script_and_no_data_set_that_holds_languages() -> None:
    chosen = choose_hold_out(DOCUMENTS, 2, 2)
    assert "ja" in chosen.sources
    assert len(set(chosen.sources) & {"fr", "de"}) == 1
    assert set(chosen.data_sets) == {"questions", "problems"}


def test_the_rule_knows_names_alone() -> None:
    assert choose_hold_out(DOCUMENTS, 2, 1) == choose_hold_out(DOCUMENTS[::-1], 2, 1)


def test_the_shipped_corpus_gives_ten_scripts_and_a_data_set() -> None:
    documents = shipped_texts()
    chosen = choose_hold_out(documents, 10, 1)
    scripts = {d.source: d.script for d in documents}
    assert len({scripts[name] for name in chosen.sources}) == 10
    assert not {"en", "mathematics", "code"} & set(chosen.sources)
    assert chosen.data_sets == ("mt_bench",)


def test_a_held_out_text_is_in_no_other_part() -> None:
    # Fails where only one of both parts is masked, or where a data set is taken for its source.
    hold_out = HoldOut(sources=("ja",), data_sets=("questions",))
    parts = set_aside(states_of([0, 2, 4, 4]), states_of([1, 2, 3, 4]), DOCUMENTS, hold_out)
    assert parts.calibration.states.flatten().tolist() == [0]
    assert parts.selection.states.flatten().tolist() == [1, 3]
    assert parts.held_out is not None
    assert parts.held_out.states.flatten().tolist() == [2, 4, 4, 2, 4]
    assert parts.held_out.counts() == {"ja": 2, "questions": 3}


def test_texts_that_choose_calibrate_nothing() -> None:
    """Fails where they choose by their test part alone, or where rows lose their order."""
    held, choosing = HoldOut(sources=("ja",)), HoldOut(data_sets=("questions",))
    calibration, test = states_of([0, 2, 4, 4, 5]), states_of([1, 2, 3, 4])
    parts = set_aside(calibration, test, DOCUMENTS, held, choosing)
    assert parts.calibration.states.flatten().tolist() == [0, 5]
    assert parts.selection.states.flatten().tolist() == [4, 4, 1, 3, 4]
    assert parts.selection.counts() == {"de": 1, "en": 4}
    assert parts.held_out is not None
    assert parts.held_out.states.flatten().tolist() == [2, 2]
    order = divide(calibration, test, DOCUMENTS, held, choosing).order
    found = order(calibration.states.flatten(), test.states.flatten())
    everything = (parts.calibration, parts.selection, parts.held_out)
    assert torch.equal(found, torch.cat([part.states.flatten() for part in everything]))


def test_texts_may_choose_where_none_is_held_out() -> None:
    parts = set_aside(
        states_of([0, 2]), states_of([1, 2]), DOCUMENTS, HoldOut(), HoldOut(sources=("ja",))
    )
    assert parts.held_out is None
    assert parts.calibration.states.flatten().tolist() == [0]
    assert parts.selection.states.flatten().tolist() == [2, 1, 2]


def test_names_and_numbers_are_read_alike() -> None:
    parsed = parse_hold_out("languages=1, fr,questions", DOCUMENTS)
    assert parsed == HoldOut((*choose_hold_out(DOCUMENTS, 1, 0).sources, "fr"), ("questions",))


@pytest.mark.parametrize(
    ("text", "named"), [("xx", "'xx'"), ("languages=3", "3 languages"), ("data-sets=9", "9 data")]
)
def test_what_cannot_be_held_out_is_named(text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse_hold_out(text, DOCUMENTS)


def test_nothing_left_is_refused() -> None:
    with pytest.raises(UserError, match="no text is left"):
        set_aside(states_of([2]), states_of([0]), DOCUMENTS, HoldOut(sources=("ja",)))


def test_states_without_documents_are_refused() -> None:
    states = HiddenStates(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), ("all",), "a file")
    with pytest.raises(UserError, match="a file does not say"):
        set_aside(states, states, DOCUMENTS, HoldOut(sources=("ja",)))
