"""Texts with a source and a document name: the corpus that ships, or a user's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flashhead_dist.states.errors import HiddenStatesError

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
