"""Lines in columns: a line a row, whatever the width of the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

_GAP = 2


class Listing:
    """Rows under a header. Cells are never wrapped or cut, and what is last in a line is not padded.

    In a live display, which cannot take lines that a terminal would wrap, they end at its edge.
    """

    def __init__(self, *header: str) -> None:
        self._rows: list[list[Text]] = [[Text(name, style="bold") for name in header]]

    @property
    def row_count(self) -> int:
        return len(self._rows) - 1

    def add_row(self, *cells: str | Text) -> None:
        self._rows.append([Text(cell) if isinstance(cell, str) else cell for cell in cells])

    def lines(self) -> list[Text]:
        """The header and the rows, without trailing blanks."""
        widths = [max(cell.cell_len for cell in column) for column in zip(*self._rows, strict=True)]
        return [_line(row, widths) for row in self._rows]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines():
            line.no_wrap = True
            line.overflow = options.overflow or "ellipsis"
            yield line


def _line(row: Sequence[Text], widths: Sequence[int]) -> Text:
    line = Text()
    for cell, width in zip(row, widths, strict=True):
        line.append_text(cell)
        line.append(" " * (width - cell.cell_len + _GAP))
    line.rstrip()
    return line


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts `m-r2` before `m-r10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
