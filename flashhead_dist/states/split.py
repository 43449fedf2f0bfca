"""Texts, and which of their tokens calibrate, select or are held out.

Documents are never divided between parts.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flashhead_dist.states.files import HiddenStates, HiddenStatesError

_CORPUS = Path(__file__).parent.parent / "corpus"


@dataclass(frozen=True)
class Document:
    """One text; documents are never divided between calibration and test."""

    source: str
    name: str
    text: str
    data_set: str = ""
    """Folder or file that the text came in."""
    script: str = ""
    """Writing system, where the text says so."""


def shipped_texts() -> list[Document]:
    """The corpus of `flashhead_dist/corpus`: see its README for sources and licences."""
    documents = [d for path in sorted(_CORPUS.glob("*/*.jsonl")) for d in _from_jsonl(path, "en")]
    documents += [
        Document("code", path.name, path.read_text(encoding="utf-8"), "code")
        for path in sorted((_CORPUS / "code").glob("*.txt"))
    ]
    return documents


def read_texts(path: Path) -> list[Document]:
    """A .jsonl or .txt file, or a folder of them.

    A .jsonl line is an object with `text`, optionally `source` and `document`. A .txt file is one
    document; its source is the folder that holds it.
    Raises HiddenStatesError where nothing is found or a line is malformed.
    """
    if not path.exists():
        raise HiddenStatesError(
            f"The texts {path} do not exist; give a folder of .txt or .jsonl files, or one file."
        )
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    documents = [d for file in files for d in _from_file(file)]
    if not documents:
        raise HiddenStatesError(
            f"{path} holds no text; give a folder of .txt or .jsonl files, or one file."
        )
    return documents


def texts_hash(documents: list[Document]) -> str:
    """Hex sha256 over sources, names and texts."""
    fields = [(d.source, d.name, d.text) for d in documents]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def _from_file(path: Path) -> Iterator[Document]:
    if path.suffix == ".jsonl":
        yield from _from_jsonl(path, path.stem)
    elif path.suffix == ".txt":
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise HiddenStatesError(f"{path} is not UTF-8 text; convert it.") from error
        folder = path.parent.name or "texts"
        yield Document(folder, path.name, text, folder)


def _from_jsonl(path: Path, default_source: str) -> Iterator[Document]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                text, source = item["text"], str(item.get("source", default_source))
                name = str(item.get("document", f"{path.name}:{number}"))
                if not isinstance(text, str):
                    raise TypeError("text is no string")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise HiddenStatesError(
                    f"Line {number} of {path} is no JSON object with a string `text`; correct it."
                ) from error
            data_set = path.parent.name if path.is_relative_to(_CORPUS) else path.stem
            yield Document(source, name, text, data_set, str(item.get("script", "")))


Part = Literal["calibration", "test"]
PARTS: tuple[Part, Part] = ("calibration", "test")

# Sources with more to say than one language has: they get this many shares of the states.
_SHARES = {"mathematics": 5, "code": 5, "en": 5}
LARGE_SOURCES = tuple(_SHARES)
"""English and what is no language: see `hold_out`."""
_MIN_CONTEXT = 160
# Testing needs more states than calibrating: a language's share must resolve misses of 1 %.
_PART_SHARES: dict[Part, float] = {"calibration": 0.42, "test": 0.58}
PLAN_SETTINGS = (1, _SHARES, _MIN_CONTEXT, _PART_SHARES)
"""A version and every constant of the plan, for the cache key of what it leads to."""


@dataclass(frozen=True)
class Passage:
    """Tokens to run the body over, and the positions whose states are kept."""

    source: str
    part: Part
    document: int
    token_ids: list[int]
    positions: list[int]


def split_by_document(documents: list[Document]) -> list[Part]:
    """The part of each document, alternating within a source in an order that only the text fixes.

    A source with two documents or more is in both parts; one with a single document calibrates.
    """
    by_source: dict[str, list[int]] = defaultdict(list)
    for index, document in enumerate(documents):
        by_source[document.source].append(index)
    parts: list[Part] = ["calibration"] * len(documents)
    for indices in by_source.values():
        ordered = sorted(indices, key=lambda i: _order(documents[i]))
        for i in ordered[1::2]:
            parts[i] = "test"
    return parts


def plan_passages(
    documents: list[Document],
    token_ids: list[list[int]],
    *,
    max_tokens: int,
    max_context: int,
    oversampling: float,
) -> list[Passage]:
    """Choose tokens so that about `max_tokens` states come out, evenly over sources and parts.

    Of each chosen text up to `max_context` tokens are run, and an even subset of 1/`oversampling`
    of the positions kept where the source has that many: neighbours are alike, and more documents
    are worth more than more of one. The first position (BOS or an attention sink) is never kept.
    """
    parts = split_by_document(documents)
    groups: dict[tuple[str, Part], list[int]] = defaultdict(list)
    for index, document in enumerate(documents):
        if len(token_ids[index]) > 1:
            groups[document.source, parts[index]].append(index)
    sources = {source for source, _ in groups}
    share = max_tokens / sum(_SHARES.get(source, 1) for source in sources)
    passages: list[Passage] = []
    for (source, part), indices in sorted(groups.items()):
        quota = max(1, round(share * _SHARES.get(source, 1) * _PART_SHARES[part]))
        indices.sort(key=lambda i: _order(documents[i]))
        budget = round(oversampling * quota)
        context = min(max_context, max(_MIN_CONTEXT, -(-budget // len(indices))))
        chosen = _take(indices, token_ids, context, budget)
        kept = _spread(sum(len(t) - 1 for _, t in chosen), quota)
        offset = 0
        for index, tokens in chosen:
            positions = [1 + k - offset for k in kept if offset <= k < offset + len(tokens) - 1]
            offset += len(tokens) - 1
            passages.append(Passage(source, part, index, tokens, positions))
    return passages


def _take(
    indices: list[int], token_ids: list[list[int]], context: int, budget: int
) -> list[tuple[int, list[int]]]:
    chosen: list[tuple[int, list[int]]] = []
    for index in indices:
        if budget <= 0:
            break
        tokens = token_ids[index][:context]
        chosen.append((index, tokens))
        budget -= len(tokens) - 1
    return chosen


def _spread(available: int, wanted: int) -> list[int]:
    """`wanted` numbers, or all, evenly over range(available)."""
    wanted = min(wanted, available)
    return [i * available // wanted for i in range(wanted)]


def _order(document: Document) -> str:
    return hashlib.sha256(
        f"{document.source}\n{document.name}\n{document.text}".encode()
    ).hexdigest()


_LANGUAGES, _DATA_SETS = "languages", "data-sets"


@dataclass(frozen=True)
class HoldOut:
    """Names of sources (languages) and of data sets that are held out whole."""

    sources: tuple[str, ...] = ()
    data_sets: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.sources or self.data_sets)

    @property
    def names(self) -> tuple[str, ...]:
        return self.sources + self.data_sets

    def mask(self, states: HiddenStates, documents: Sequence[Document]) -> Tensor:
        """Which of N `states` are of a held-out text: bool `[N]`.

        documents: the texts that the states were collected from, in that order.

        Raises:
            HiddenStatesError: states that do not say which document each is of.
        """
        numbers = states.documents
        if numbers is None or (len(numbers) and int(numbers.max()) >= len(documents)):
            raise HiddenStatesError(
                f"{states.origin} does not say which text each state is of, so none can be held "
                "out; collect the states from texts."
            )
        held = [d.source in self.sources or d.data_set in self.data_sets for d in documents]
        return torch.tensor(held)[numbers]


@dataclass(frozen=True)
class Parts:
    """States that calibrate, that choose among parameters, and that neither ever saw.

    Sources of `held_out` are its languages and, under their own names, its data sets.
    """

    calibration: HiddenStates
    selection: HiddenStates
    held_out: HiddenStates | None


def choose_hold_out(
    documents: Sequence[Document], num_languages: int, num_data_sets: int
) -> HoldOut:
    """Languages of as many scripts, and data sets, in the order of the sha256 of their names.

    English, mathematics and code are no languages here; a data set is one all of whose texts are of
    these.

    Raises:
        HiddenStatesError: fewer scripts or data sets than asked for.
    """
    scripts: dict[str, str] = {}
    of_data_set: dict[str, set[str]] = defaultdict(set)
    for document in documents:
        of_data_set[document.data_set].add(document.source)
        if document.source not in LARGE_SOURCES and document.script:
            scripts[document.source] = document.script
    languages: dict[str, str] = {}
    for name in _in_order(scripts):
        languages.setdefault(scripts[name], name)
    data_sets = _in_order(
        name for name, sources in of_data_set.items() if sources <= set(LARGE_SOURCES)
    )
    for what, found, wanted in (
        ("languages of different scripts", len(languages), num_languages),
        ("data sets", len(data_sets), num_data_sets),
    ):
        if wanted > found:
            raise HiddenStatesError(
                f"{wanted} {what} cannot be held out of texts that have {found}; hold out fewer."
            )
    chosen = tuple(languages.values())[:num_languages]
    return HoldOut(chosen, tuple(data_sets[:num_data_sets]))


def parse_hold_out(text: str, documents: Sequence[Document]) -> HoldOut:
    """`languages=10,data-sets=1` by the rule, or names of sources and data sets.

    Raises:
        HiddenStatesError: a name that no text has, or a number that is none.
    """
    counts = {_LANGUAGES: 0, _DATA_SETS: 0}
    sources, data_sets = {d.source for d in documents}, {d.data_set for d in documents}
    named: tuple[list[str], list[str]] = ([], [])
    for item in filter(None, (part.strip() for part in text.split(","))):
        what, _, number = item.partition("=")
        if what in counts and number.isdecimal():
            counts[what] = int(number)
        elif item in sources:
            named[0].append(item)
        elif item in data_sets:
            named[1].append(item)
        else:
            raise HiddenStatesError(
                f"{item!r} can not be held out: the texts have no such source or data set; give "
                f"names, or {_LANGUAGES}=N and {_DATA_SETS}=N."
            )
    ruled = choose_hold_out(documents, counts[_LANGUAGES], counts[_DATA_SETS])
    return HoldOut(
        tuple(dict.fromkeys((*ruled.sources, *named[0]))),
        tuple(dict.fromkeys((*ruled.data_sets, *named[1]))),
    )


@dataclass(frozen=True)
class Division:
    """Which calibration and which test states make up each part: a pair of bool masks a part."""

    calibration: tuple[Tensor, Tensor]
    selection: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]

    def order(self, calibration: Tensor, test: Tensor) -> Tensor:
        """Rows that belong to the states, in the order of the parts, calibration states first."""
        pairs = (self.calibration, self.selection, self.held_out)
        return torch.cat([piece for pair in pairs for piece in _pick(pair, calibration, test)])


def divide(
    calibration: HiddenStates,
    test: HiddenStates,
    documents: Sequence[Document],
    hold_out: HoldOut,
    choose_by: HoldOut = HoldOut(),
) -> Division:
    """The three parts; texts of `choose_by` select with all their states and calibrate nothing.

    Raises:
        HiddenStatesError: nothing is left to calibrate or to choose by.
    """
    both = (calibration, test)
    none = [torch.zeros(len(states), dtype=torch.bool) for states in both]
    held = [hold_out.mask(states, documents) for states in both] if hold_out else none
    choosing = [choose_by.mask(states, documents) for states in both] if choose_by else none
    division = Division(
        calibration=(~held[0] & ~choosing[0], none[1]),
        selection=(choosing[0] & ~held[0], ~held[1]),
        held_out=(held[0], held[1]),
    )
    if not bool(division.calibration[0].any() and division.selection[1].any()):
        names = ", ".join((*hold_out.names, *choose_by.names)) or "nothing"
        raise HiddenStatesError(f"With {names} held out no text is left; hold out fewer.")
    return division


def set_aside(
    calibration: HiddenStates,
    test: HiddenStates,
    documents: Sequence[Document],
    hold_out: HoldOut,
    choose_by: HoldOut = HoldOut(),
) -> Parts:
    """Take the held-out texts' states out of both parts and put them together.

    choose_by: texts that do not calibrate either, and join those that choose.

    Raises:
        HiddenStatesError: nothing is left to calibrate or to choose by.
    """
    if not hold_out and not choose_by:
        return Parts(calibration, test, None)
    division = divide(calibration, test, documents, hold_out, choose_by)
    taken = len(hold_out.names)
    kept = replace(
        calibration.subset(division.calibration[0]),
        origin=f"{calibration.origin}, less {taken + len(choose_by.names)} held out",
    )
    selection = replace(
        test.subset(division.selection[1]), origin=f"{test.origin}, less {taken} held out"
    )
    if choose_by:
        selection = _joined(calibration.subset(division.selection[0]), selection, choose_by)
    if not hold_out:
        return Parts(kept, selection, None)
    pieces = [
        states.subset(mask)
        for states, mask in zip((calibration, test), division.held_out, strict=True)
    ]
    return Parts(kept, selection, _together(pieces, documents, hold_out))


def _pick(pair: tuple[Tensor, Tensor], calibration: Tensor, test: Tensor) -> list[Tensor]:
    return [rows[mask] for rows, mask in zip((calibration, test), pair, strict=True)]


def _joined(unseen: HiddenStates, rest: HiddenStates, choose_by: HoldOut) -> HiddenStates:
    sources = tuple(sorted({*unseen.sources, *rest.sources}))
    ids = [
        torch.tensor([sources.index(name) for name in piece.sources])[piece.source_ids]
        for piece in (unseen, rest)
    ]
    return HiddenStates(
        states=torch.cat([unseen.states, rest.states]),
        source_ids=torch.cat(ids),
        sources=sources,
        origin=f"{rest.origin}, and all of {', '.join(choose_by.names)}, unseen by calibration",
        documents=torch.cat([_documents(unseen), _documents(rest)]),
    )


def _together(
    pieces: Sequence[HiddenStates], documents: Sequence[Document], hold_out: HoldOut
) -> HiddenStates:
    numbers = torch.cat([_documents(piece) for piece in pieces])
    names = [
        d.data_set if d.data_set in hold_out.data_sets else d.source
        for d in (documents[number] for number in numbers.tolist())
    ]
    sources = tuple(sorted(set(names)))
    place = {name: index for index, name in enumerate(sources)}
    return HiddenStates(
        states=torch.cat([piece.states for piece in pieces]),
        source_ids=torch.tensor([place[name] for name in names], dtype=torch.int64),
        sources=sources,
        origin=f"held out ({', '.join(hold_out.names)}): {pieces[0].origin} and test part",
        documents=numbers,
    )


def _documents(states: HiddenStates) -> Tensor:
    assert states.documents is not None
    return states.documents


def _in_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
