"""Tables of text: aligned columns for a terminal, and Markdown."""

from collections.abc import Sequence

Cells = Sequence[Sequence[str]]  # rows of cells, the header first; all of one length


def text_table(rows: Cells) -> str:
    """Columns two spaces apart; the first one left-aligned, the others right-aligned."""
    return "\n".join("  ".join(row).rstrip() for row in _aligned(rows))


def markdown_table(rows: Cells) -> str:
    """A Markdown table with the same alignment, in columns that are also readable as text."""
    rows = [[" ".join(cell.split("\n")).replace("|", "\\|") for cell in row] for row in rows]
    header, *body = _aligned(rows)
    rule = ["-" * len(header[0]), *("-" * (len(cell) - 1) + ":" for cell in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *body])


def _aligned(rows: Cells) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        for row in rows
    ]
