"""The directive `csrcdoc`: the DOC block at the top of a C file, as a section of the manual.

    .. csrcdoc:: peer.c        one file
    .. csrcdoc:: *             every file that has a block, in the order of the floor table in csrc/README.md

A block reads like this (the comment's stars left out):

    DOC: title

    Paragraphs, with `literals`. Lines indented by three or more are a literal block.

    - items
    NAME-1. A numbered invariant, which may go on
        in further lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

INVARIANT = re.compile(r"([A-Z][A-Z0-9_]*-\d+)\.\s+(.*)")
ITEM = re.compile(r"([-*]|\d+\.)\s+(.*)")


class Block(NamedTuple):
    """A DOC block: its title and its lines without the comment's stars."""

    title: str
    lines: list[str]


def read_block(source: str) -> Block | None:
    """The DOC block of a C file, or None if it has none."""
    comment = re.search(r"/\*\n \* DOC: (.+)\n((?: \*(?!/).*\n)*) \*/", source)
    if comment is None:
        return None
    lines = [line[3:].rstrip() if line.startswith(" * ") else "" for line in comment[2].splitlines()]
    # A tab stands for what is left of the eight columns after the star and its space.
    return Block(comment[1].strip(), [line.expandtabs(8) for line in lines])


def files_in_order(csrc: Path) -> list[str]:
    """The C files with a DOC block, by floor."""
    rows = re.findall(r"^\|\s*\d+\s*\|([^|]*)\|", (csrc / "README.md").read_text(encoding="utf-8"), re.M)
    named = [p.replace(".[ch]", ".c") for row in rows for p in re.findall(r"`([^`]+)`", row)]
    there = [name for name in named if (csrc / name).is_file()]
    return [name for name in there if read_block((csrc / name).read_text(encoding="utf-8"))]


def inline(text: str) -> list[nodes.Node]:
    """Text in which `this` is a literal."""
    parts = re.split(r"`([^`]+)`", text)
    made: list[nodes.Node] = []
    for number, part in enumerate(parts):
        if part:
            made.append(nodes.literal(part, part) if number % 2 else nodes.Text(part))
    return made


def is_literal(line: str) -> bool:
    return line.startswith("   ")


def chunks(lines: Iterable[str]) -> Iterator[list[str]]:
    """Split at blank lines; but blank lines inside a literal block stay."""
    chunk: list[str] = []
    blanks = 0
    for line in lines:
        if not line:
            blanks += bool(chunk)
        elif blanks and not (is_literal(line) and is_literal(chunk[0])):
            yield chunk
            chunk, blanks = [line], 0
        else:
            chunk += [""] * blanks + [line]
            blanks = 0
    if chunk:
        yield chunk


def paragraph(lines: list[str]) -> nodes.paragraph:
    text = " ".join(line.strip() for line in lines)
    return nodes.paragraph(text, "", *inline(text))


def literal(lines: list[str]) -> nodes.literal_block:
    indent = min(len(line) - len(line.lstrip()) for line in lines if line)
    text = "\n".join(line[indent:] for line in lines)
    return nodes.literal_block(text, text, language="none")


def pieces(chunk: list[str]) -> list[list[str]]:
    """Cut a chunk where an invariant or an item begins, and where a paragraph turns into a literal block."""
    cut: list[list[str]] = []
    for line in chunk:
        starts = INVARIANT.match(line) or ITEM.match(line)
        listed = cut and (INVARIANT.match(cut[-1][0]) or ITEM.match(cut[-1][0]))
        turns = cut and not listed and is_literal(line) != is_literal(cut[-1][0]) and line
        if starts or turns or not cut:
            cut.append([line])
        else:
            cut[-1].append(line)
    return cut


def render(lines: list[str]) -> list[nodes.Element]:
    """The body of a block as docutils nodes; neighbouring invariants and items share one list."""
    made: list[nodes.Element] = []

    def grow(kind: type[nodes.Element], entry: nodes.Element, **options: Any) -> None:
        if not (made and isinstance(made[-1], kind)):
            made.append(kind(**options))
        made[-1].append(entry)

    for piece in (piece for chunk in chunks(lines) for piece in pieces(chunk)):
        if is_literal(piece[0]):
            made.append(literal(piece))
        elif invariant := INVARIANT.match(piece[0]):
            name, rest = invariant.groups()
            term = nodes.term(name, name, ids=[nodes.make_id(name)])
            body = nodes.definition("", paragraph([rest, *piece[1:]]))
            grow(nodes.definition_list, nodes.definition_list_item("", term, body))
        elif item := ITEM.match(piece[0]):
            entry = nodes.list_item("", paragraph([item[2], *piece[1:]]))
            if item[1] in "-*":
                grow(nodes.bullet_list, entry, bullet="-")
            else:
                grow(nodes.enumerated_list, entry, enumtype="arabic", prefix="", suffix=".")
        else:
            made.append(paragraph(piece))
    return made


class CsrcDoc(SphinxDirective):
    """One C file's DOC block, or all of them."""

    required_arguments: ClassVar[int] = 1
    has_content: ClassVar[bool] = False

    def run(self) -> list[nodes.Node]:
        csrc = Path(self.env.app.srcdir, self.config.csrcdoc_path).resolve()
        if self.arguments[0] == "*":
            self.env.note_dependency(str(csrc / "README.md"))
            return [self.section(csrc / name, True) for name in files_in_order(csrc)]
        return [self.section(csrc / self.arguments[0], False)]

    def section(self, path: Path, referable: bool) -> nodes.section:
        """A file's block; others may refer to it by the file's name, in the one place where all stand."""
        self.env.note_dependency(str(path))
        if not path.is_file():
            raise self.error(f"csrcdoc: there is no {path.name}")
        block = read_block(path.read_text(encoding="utf-8"))
        if block is None:
            raise self.error(f"csrcdoc: {path.name} has no DOC block")
        section = nodes.section(ids=[nodes.make_id(path.name)], names=[path.name])
        section += nodes.title("", "", *inline(f"{block.title} (`{path.name}`)"))
        section += render(block.lines)
        self.set_source_info(section)
        if referable:
            self.state.document.note_explicit_target(section)
        else:
            self.state.document.note_implicit_target(section)
        return section


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_config_value("csrcdoc_path", "../csrc", "env", str)
    app.add_directive("csrcdoc", CsrcDoc)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
