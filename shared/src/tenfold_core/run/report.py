# SPDX-License-Identifier: Apache-2.0
"""Tables, progress and figures for people; all of it goes to stderr or to a file.

Rich draws when stderr is a terminal; in a pipe, or with ``NO_COLOR`` set, it is plain text.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "ACCENT",
    "BASELINE",
    "PALETTE",
    "figure",
    "is_plain",
    "markdown_table",
    "print_table",
    "progress",
    "text_table",
]

_T = TypeVar("_T")

PALETTE = {
    "blue": "#0072b2", "orange": "#e69f00", "green": "#009e73", "purple": "#cc79a7",
    "sky": "#56b4e9", "vermilion": "#d55e00", "yellow": "#f0e442", "grey": "#7f7f7f",
}  # fmt: skip
"""Okabe and Ito's colours, told apart with any kind of colour vision."""
ACCENT = PALETTE["vermilion"]
"""The colour of our own method."""
BASELINE = PALETTE["grey"]
"""The colour of what it is compared with."""

_COLUMN_INCHES = 3.5


def is_plain(stream: IO[str] | None = None) -> bool:
    """Tell whether a stream, stderr by default, wants text without colours and frames."""
    stream = sys.stderr if stream is None else stream
    return bool(os.environ.get("NO_COLOR")) or not stream.isatty()


def text_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Lay out a table as text: the first column left-aligned, the others right."""
    cells = [list(map(str, columns)), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a table in Markdown: the first column left-aligned, the others right."""

    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    rule = "|---|" + "--:|" * (len(columns) - 1)
    return "\n".join([line(columns), rule, *map(line, rows)])


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    title: str = "",
    stream: IO[str] | None = None,
) -> None:
    """Print a table to stderr, or to ``stream``, framed only where a person reads it."""
    stream = sys.stderr if stream is None else stream
    if is_plain(stream):
        print(f"{title}\n" if title else "", text_table(columns, rows), sep="", file=stream)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left")
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=place == 0)
    for row in rows:
        table.add_row(*(str(cell).replace("[", "\\[") for cell in row))
    Console(file=stream).print(table)


def progress(
    items: Iterable[_T], *, description: str, total: int | None = None, quiet: bool = False
) -> Iterator[_T]:
    """Yield the items while a bar on stderr moves; without a terminal, stay silent."""
    if quiet or is_plain():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(
        items,
        description=description,
        total=total,
        console=Console(file=sys.stderr),
        transient=True,
    )


@contextmanager
def figure(
    path: str | os.PathLike[str], *, columns: int = 1, aspect: float = 0.75, dark: bool = False
) -> "Iterator[Figure]":
    """Yield a figure in the house style and save it atomically, in the format of the name.

    Args:
        path: Where to save it; ``.svg`` for the repository.
        columns: Width in text columns of 3.5 inches.
        aspect: Height over width.
        dark: Light ink for a dark page; the ground stays transparent.

    Raises:
        MissingExtraError: Matplotlib is not installed.
    """
    from tenfold_core.errors import MissingExtraError
    from tenfold_core.run.atomic import atomic_path

    try:
        import matplotlib as mpl
        from cycler import cycler
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("figures need Matplotlib: pip install matplotlib") from error
    ink = "#e6e6e6" if dark else "#1a1a1a"
    style = {
        "font.size": 8,
        "text.color": ink,
        "axes.edgecolor": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.facecolor": "none",
        "axes.prop_cycle": cycler(color=list(PALETTE.values())),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "tenfold",  # the same figure gives the same file
    }
    width = _COLUMN_INCHES * columns
    with mpl.rc_context(style):
        drawing = Figure(figsize=(width, width * aspect), layout="constrained")
        yield drawing
        dated = {"Date": None} if str(path).endswith(".svg") else {}
        with atomic_path(path) as temporary:
            drawing.savefig(temporary, transparent=True, metadata=dated)
