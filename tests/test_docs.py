"""README and docs: every link leads somewhere, and every command names what exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
README_LINES = 120
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_SCRIPT = re.compile(r"(?<!tests/)\b(?:launch|kernels|profiles)/\w+\.(?:py|sh)(?: [a-z]+\b)?")
"""A script, and a subcommand of it."""


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page if not name else (page.parent / name).resolve()
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def commands(page: Path) -> Iterator[str]:
    """Shell commands of a page: indented or fenced lines, and inline code, that run a script."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    prose = re.sub(r"^( {4}|```).*$", "", text, flags=re.MULTILINE)
    inline = [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]
    for line in [*re.findall(r"^ {4}(.+)$", text, re.MULTILINE), *inline]:
        if re.match(r"(?:\S+=\S+ )*(?:sudo )?(?:\S*python3?|\S*torchrun|launch/profile)", line):
            yield re.split(r"\s{3,}", line.strip())[0]


@cache
def flags_of(script: str) -> set[str]:
    """The flags that --help lists; of a subcommand too, if the script has it."""
    path, *rest = script.split()
    interpreter = "bash" if path.endswith(".sh") else sys.executable
    asked = [[*rest, "--help"], ["--help"]]
    for words in asked if rest else asked[1:]:
        done = subprocess.run([interpreter, path, *words], cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0:
            return set(re.findall(r"--[\w-]+", done.stdout))
    pytest.fail(f"{script} --help fails: {done.stderr}")


def test_every_link_leads_somewhere() -> None:
    broken = {str(page.relative_to(ROOT)): broken_links(page) for page in PAGES}
    assert not {page: links for page, links in broken.items() if links}


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A part\n[a](#a-part) [b](#b-part) [c](missing.md) [d](page.md)\n")
    assert broken_links(page) == ["#b-part", "missing.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_scripts_and_flags_that_exist(page: Path) -> None:
    for command in commands(page):
        for part in re.split(r"\s--\s", command):
            script = _SCRIPT.search(part)
            if script is None:
                continue
            assert (ROOT / script[0].split()[0]).is_file(), command
            own = part[script.end() :].split("#")[0]
            given = {word.split("=")[0] for word in shlex.split(own) if word.startswith("--")}
            assert given <= flags_of(script[0]), command


def test_make_targets_of_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"(?:^ {4}|`)make ([a-z-]+)", page.read_text(), re.MULTILINE):
            assert target in targets, f"{page.name}: make {target}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES
