"""Check the documentation: links and anchors, commands, make targets, and paths of somebody's machine.

Usage: `python tools/check_docs.py [ROOT]`; prints one line for each offence and exits 1 if there is any.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^\s*(```|~~~)")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_REFERENCE = re.compile(r"^\s*\[[^\]]+\]:\s*(\S+)")
_SPAN = re.compile(r"(`+)(.+?)\1")
_HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*#*$")
_ANCHOR = re.compile(r"<a\s+(?:id|name)=\"([^\"]+)\"")
_TARGET = re.compile(r"^([a-z][\w-]*)\s*:(?![:=])", re.MULTILINE)
_PLACEHOLDER = re.compile(r"[A-Z…<\[{$.]|\d")
_MACHINE_PATH = re.compile(r"(?<![\w.~$}*/-])/(?:work|root|farm|tmp/brief)(?![\w-])")


@dataclass(frozen=True)
class Code:
    """A piece of text that stands as code in a page."""

    line: int
    text: str


def pages_of(root: Path) -> list[Path]:
    """The pages that are checked."""
    pages = [root / name for name in ("README.md", "CHANGELOG.md")]
    return [page for page in pages if page.exists()] + sorted((root / "docs").rglob("*.md"))


def prose_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines outside code fences, with their numbers."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            yield number, line


def code_of(text: str) -> Iterator[Code]:
    """Code spans, and the lines of code fences (without a `$ ` in front or a comment behind)."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if _FENCE.match(line):
            fenced = not fenced
        elif fenced:
            yield Code(number, re.sub(r"\s+#\s.*$", "", line.strip().removeprefix("$ ")))
        else:
            for span in _SPAN.findall(line):
                yield Code(number, span[1].strip())


def anchors_of(text: str) -> set[str]:
    """The anchors of a page, made of its headings as GitHub does, and those that are set by hand."""
    anchors: set[str] = set()
    for _, line in prose_lines(text):
        anchors.update(_ANCHOR.findall(line))
        heading = _HEADING.match(line)
        if heading:
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[2]).lower()
            slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
            number, candidate = 0, slug
            while candidate in anchors:
                number += 1
                candidate = f"{slug}-{number}"
            anchors.add(candidate)
    return anchors


def link_offences(page: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Relative links to what does not exist."""
    for number, line in prose_lines(page.read_text()):
        bare = _SPAN.sub("", line)
        for target in _LINK.findall(bare) + _REFERENCE.findall(bare):
            if re.match(r"[a-z][a-z0-9+.-]*:", target):
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            if not file.exists():
                yield number, f"link to {target}: there is no {name}"
            elif not file.is_relative_to(root):
                yield number, f"link to {target}: it leads out of the repository"
            elif anchor and (file.suffix != ".md" or anchor not in anchors_of(file.read_text())):
                yield number, f"link to {target}: {file.name} has no heading #{anchor}"


def make_offences(page: Path, targets: set[str]) -> Iterator[tuple[int, str]]:
    """`make X` where the Makefile has no X."""
    for code in code_of(page.read_text()):
        words = code.text.split()
        if words[:1] != ["make"]:
            continue
        for word in words[1:]:
            if "=" in word or word.startswith("-"):
                continue
            if not re.fullmatch(r"[a-z][\w|-]*", word):
                break
            for name in word.split("|"):
                if name not in targets:
                    yield code.line, f"`{code.text}`: the Makefile has no target {name}"


def command_offences(page: Path, parser: argparse.ArgumentParser) -> Iterator[tuple[int, str]]:
    """`hydro …` (or what the parser is for) where the command line has no such command or option."""
    for code in code_of(page.read_text()):
        words = code.text.split()
        if words and words[0] in {parser.prog, f".venv/bin/{parser.prog}"}:
            for message in _command_offences(words[1:], parser):
                yield code.line, f"`{code.text}`: {message}"


def _command_offences(words: list[str], parser: argparse.ArgumentParser) -> Iterator[str]:
    for index, word in enumerate(words):
        if word == "--":
            return
        if word.startswith("-"):
            known = any(word.partition("=")[0] in action.option_strings for action in parser._actions)
            if not known and not parser.get_default("takes_sbatch_options"):
                yield f"{parser.prog} has no option {word}"
            continue
        commands = _subcommands(parser)
        if commands is None or _PLACEHOLDER.match(word):
            continue
        for name in word.split("|"):
            if name in commands:
                yield from _command_offences(words[index + 1 :], commands[name])
            else:
                yield f"{parser.prog} has no command {name}"
        return


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser] | None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return None


def files_of(root: Path) -> list[Path]:
    """The files that git tracks; without git, every text file."""
    listing = subprocess.run(["git", "ls-files", "-z"], check=False, cwd=root, capture_output=True, text=True)
    if listing.returncode == 0:
        return [root / name for name in listing.stdout.split("\0") if name and (root / name).is_file()]
    return [path for path in sorted(root.rglob("*")) if path.is_file()]


def path_offences(path: Path) -> Iterator[tuple[int, str]]:
    """Absolute paths that exist on one machine only."""
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        return
    for number, line in enumerate(text.splitlines(), 1):
        found = _MACHINE_PATH.search(line)
        if found:
            yield number, f"{found[0]} is a path of one machine"


def command_line_parser(root: Path) -> argparse.ArgumentParser | None:
    """What `hydro` parses its arguments with; None where the checkout has no command line."""
    return _parser_of(root, "hydro_slurm/cli/main.py", "hydro_slurm.cli.main")


def simulator_parser(root: Path) -> argparse.ArgumentParser | None:
    """The same of `hydro-sim`."""
    return _parser_of(root / "sim", "hydro_sim/cli.py", "hydro_sim.cli")


def _parser_of(folder: Path, file: str, module: str) -> argparse.ArgumentParser | None:
    if not (folder / file).exists():
        return None
    sys.path.insert(0, str(folder))
    parser = importlib.import_module(module).make_parser()
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def check(root: Path, *parsers: argparse.ArgumentParser | None) -> list[str]:
    """All offences, as `file:line: message`."""
    makefile = root / "Makefile"
    targets = set(_TARGET.findall(makefile.read_text())) if makefile.exists() else set()
    offences = []
    for page in pages_of(root):
        found = [*link_offences(page, root), *make_offences(page, targets)]
        for parser in filter(None, parsers):
            found += command_offences(page, parser)
        offences += [f"{page.relative_to(root)}:{line}: {message}" for line, message in sorted(found)]
    for path in files_of(root):
        offences += [f"{path.relative_to(root)}:{line}: {message}" for line, message in path_offences(path)]
    return offences


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    offences = check(root, command_line_parser(root), simulator_parser(root))
    for offence in offences:
        print(offence)
    print(f"check_docs: {len(offences)} offences in {len(pages_of(root))} pages")
    return 1 if offences else 0


if __name__ == "__main__":
    raise SystemExit(main())
