# SPDX-License-Identifier: Apache-2.0
"""Edge lists: one ``from to [weight]`` a line, separated by blanks, tabs or commas."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hbp_spmv.errors import ReadError
from hbp_spmv.readers.finish import Options, Raw, check_memory, memory_bound
from hbp_spmv.readers.text import Block, Words, blocks, is_number, parse, shorten

__all__ = ["read_edgelist"]

_HEADER_BYTES = 2000
_BYTES_PER_EDGE = 24


@dataclass(slots=True)
class _Edges:
    """The edges read so far, and the lines of the smallest and the largest index."""

    parts: list[npt.NDArray] = field(default_factory=list)
    weights: list[npt.NDArray] = field(default_factory=list)
    width: int = 0
    count: int = 0
    smallest: int = 2**63 - 1
    largest: int = -1
    largest_line: int = 0
    header: str = ""


def read_edgelist(path: Path, options: Options) -> Raw:
    """Read a graph as its square adjacency matrix; an edge without weight has the value 1.

    Comments begin with ``#`` or ``%``, a line of column names may come first. Vertices are
    numbered from 0 if the index 0 occurs anywhere, else from 1; ``index_base`` records which.

    Raises:
        ReadError: A line is no edge, an index is negative or too large, or there is no edge.
    """
    limit = memory_bound(options.max_memory)
    edges = _Edges()
    for block in blocks(path, limit):
        if not edges.count:
            edges.header, block = _column_names(block, edges.header)
        words = parse(block, comments=b"#%", commas=True)
        if len(words.values):
            _take(edges, block, words)
        if edges.count * _BYTES_PER_EDGE > limit:
            raise ReadError(
                f"{path}:{block.first_line}: more than {edges.count} edges, too many for the limit "
                f"of {limit / 1e9:.3g} GB; raise --max-memory"
            )
    if not edges.count:
        raise ReadError(f"{path}: found no edge, expected lines 'from to [weight]'")
    base = 0 if edges.smallest == 0 else 1
    size = edges.largest + 1 - base
    check_memory(f"{path}:{edges.largest_line}", (size, size), edges.count, np.dtype("f8"), limit)
    ends = np.concatenate(edges.parts)
    weights = np.concatenate(edges.weights) if edges.width == 3 else np.ones(edges.count)
    return Raw(
        where=str(path),
        format="edgelist",
        header=edges.header.rstrip(),
        shape=(size, size),
        rows=ends[:, 0] - base,
        columns=ends[:, 1] - base,
        values=weights,
        index_base=base,
    )


def _column_names(block: Block, before: str) -> tuple[str, Block]:
    """Keep the comments in front of the first edge, and clear a line of column names."""
    kept, offset = before, 0
    for line in block.text.splitlines(keepends=True):
        words = line.replace(b",", b" ").split()
        comment = bool(words) and words[0][:1] in b"#%"
        names = len(words) in (2, 3) and not any(map(is_number, words))
        if words and not comment and not names:
            break
        if words and len(kept) < _HEADER_BYTES:
            kept += line.decode("latin-1").rstrip() + "\n"
        if words and not comment:
            text = block.text[:offset] + b"#" + block.text[offset + 1 :]
            return kept, Block(block.path, block.first_line, text)
        offset += len(line)
    return kept, block


def _take(edges: _Edges, block: Block, words: Words) -> None:
    """Check the edges of a block and add them."""
    per_line = words.per_line()
    width = edges.width or int(per_line[words.lines[0]])
    odd = (per_line != 0) & (per_line != width)
    if width not in (2, 3) or odd.any():
        line = int(np.argmax(odd)) if width in (2, 3) else int(words.lines[0])
        expected = f"{width} as in the lines before" if width in (2, 3) else "2 or 3"
        raise block.fault(
            line,
            f"found {per_line[line]} words, expected {expected}: 'from to [weight]'",
        )
    table = words.values.reshape(-1, width)
    lines = words.lines[::width]
    ends = table[:, :2]
    wrong = ~((ends >= 0) & (ends == np.floor(ends)) & (ends < 2**53)).all(axis=1)
    if wrong.any():
        line = int(lines[int(np.argmax(wrong))])
        raise block.fault(
            line,
            f"found {shorten(block.line(line))}, expected two vertex numbers from 0 or 1 up",
        )
    ends = ends.astype(np.int64)
    top = int(np.argmax(ends))
    if int(ends.flat[top]) > edges.largest:
        edges.largest = int(ends.flat[top])
        edges.largest_line = block.first_line + int(lines[top // 2])
    edges.smallest = min(edges.smallest, int(ends.min()))
    edges.parts.append(ends)
    if width == 3:
        edges.weights.append(table[:, 2].astype(np.float64))
    edges.width = width
    edges.count += len(ends)
