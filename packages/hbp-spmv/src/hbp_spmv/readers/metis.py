# SPDX-License-Identifier: Apache-2.0
"""METIS graph files: a header ``vertices edges [fmt [ncon]]``, then one line per vertex."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from hbp_spmv.errors import ReadError
from hbp_spmv.readers.finish import Options, Raw, check_memory, memory_bound
from hbp_spmv.readers.text import Block, Words, blocks, parse, shorten

__all__ = ["check_symmetric", "read_metis"]


@dataclass(frozen=True, slots=True)
class _Header:
    """The header line: counts, words in front of the neighbours, and whether edges have weights."""

    text: str
    line: int
    vertices: int
    edges: int
    skipped: int
    weighted: bool


def read_metis(path: Path, options: Options) -> Raw:
    """Read a METIS graph as its symmetric adjacency matrix; edges without weight have the value 1.

    Vertex sizes and weights are checked to be there and passed over. The header counts every
    undirected edge once, the vertex lines list it at both ends.

    Raises:
        ReadError: The header, the number of lines or edges, or a neighbour is wrong.
    """
    limit = memory_bound(options.max_memory)
    stream = blocks(path, limit)
    header, remainder = _header(path, stream)
    size = (header.vertices, header.vertices)
    entries = 2 * header.edges
    check_memory(f"{path}:{header.line}", size, entries, np.dtype("f8"), limit)
    rows, columns, values = _adjacency(path, header, chain([remainder], stream))
    return Raw(
        where=str(path),
        format="metis",
        header=header.text,
        shape=size,
        rows=rows,
        columns=columns,
        values=values,
        symmetry="symmetric",
        index_base=1,
    )


def _adjacency(
    path: Path, header: _Header, stream: Iterable[Block]
) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
    """Return rows and columns from 0 and the values, in the number that the header promises."""
    parts = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0))]
    vertices, listed, expected = 0, 0, 2 * header.edges
    for block in stream:
        if not block.text:
            continue
        words = parse(block, comments=b"%")
        comment = _comment_lines(block, words.num_lines)
        vertex = np.where(comment, -1, vertices + np.cumsum(~comment) - 1)
        _check_lines(block, words, vertex, header)
        parts.append(_neighbours(block, words, vertex, header))
        vertices += int(np.count_nonzero(~comment))
        listed += len(parts[-1][0])
        if listed > expected:
            break
    if listed <= expected and vertices < header.vertices:
        raise ReadError(
            f"{path}: found {vertices} vertex lines, expected {header.vertices}; "
            "the file is truncated or its header is wrong"
        )
    if listed != expected:
        more = "or more " if listed > expected else ""
        raise ReadError(
            f"{path}: found {listed} {more}neighbours, expected {expected} for the "
            f"{header.edges} edges of line {header.line}; the file is truncated or its header wrong"
        )
    rows, columns, values = (np.concatenate(part) for part in zip(*parts, strict=True))
    return rows, columns, values


def check_symmetric(where: str, matrix: csr_array) -> None:
    """Check that every edge is listed at both ends with the same weight.

    Raises:
        ReadError: An edge is listed at one end only, or with two weights.
    """
    other = csr_array(matrix.T)
    other.sort_indices()
    if np.array_equal(matrix.indptr, other.indptr) and np.array_equal(
        matrix.indices, other.indices
    ):
        wrong = ~((matrix.data == other.data) | (np.isnan(matrix.data) & np.isnan(other.data)))
        if not wrong.any():
            return
        entry, problem = int(np.argmax(wrong)), "with another weight"
    else:
        pattern = csr_array((np.ones(matrix.nnz), matrix.indices, matrix.indptr), matrix.shape)
        lonely = csr_array(pattern - pattern.T)
        lonely.eliminate_zeros()
        positive = csr_array(lonely > 0)
        matrix, entry, problem = positive, 0, "not at all"
    row = int(np.searchsorted(matrix.indptr, entry, side="right"))
    column = int(matrix.indices[entry]) + 1
    raise ReadError(
        f"{where}: vertex {row} lists {column} as its neighbour, but {column} lists {row} "
        f"{problem}; expected an undirected graph, use --edgelist for a directed one"
    )


def _header(path: Path, stream: Iterator[Block]) -> tuple[_Header, Block]:
    """Read the header and return it with what is left of its block."""
    for block in stream:
        offset = 0
        for number, line in enumerate(block.text.split(b"\n")[:-1]):
            offset += len(line) + 1
            if line.strip() and not line.startswith(b"%"):
                header = _parse_header(block, number, line)
                return header, Block(path, header.line + 1, block.text[offset:])
    raise ReadError(f"{path}: found no header, expected 'vertices edges [fmt [ncon]]'")


def _parse_header(block: Block, number: int, line: bytes) -> _Header:
    words = line.split()
    plain = all(word.isdigit() and len(word) < 19 for word in words)
    fmt = words[2].decode("latin-1").zfill(3) if len(words) > 2 else "000"
    legal = plain and len(words) in (2, 3, 4) and len(fmt) == 3 and set(fmt) <= {"0", "1"}
    if not legal or (len(words) == 4 and fmt[1] == "0" and int(words[3]) > 0):
        raise block.fault(
            number,
            f"the header is {shorten(line.strip())}, expected 'vertices edges [fmt [ncon]]' "
            "with fmt of three digits 0 or 1, and ncon only if its second digit is 1",
        )
    ncon = (int(words[3]) if len(words) == 4 else 1) if fmt[1] == "1" else 0
    return _Header(
        text=line.decode("latin-1").strip(),
        line=block.first_line + number,
        vertices=int(words[0]),
        edges=int(words[1]),
        skipped=ncon + (fmt[0] == "1"),
        weighted=fmt[2] == "1",
    )


def _comment_lines(block: Block, num_lines: int) -> npt.NDArray[np.bool_]:
    if b"%" not in block.text:
        return np.zeros(num_lines, dtype=bool)
    letters = np.frombuffer(block.text, np.uint8)
    starts = np.concatenate([[0], np.flatnonzero(letters == 10)[:-1] + 1])
    return letters[starts] == ord("%")


def _check_lines(
    block: Block, words: Words, vertex: npt.NDArray[np.int64], header: _Header
) -> None:
    """Check the number of words of each line."""
    per_line = words.per_line()
    extra = (per_line > 0) & (vertex >= header.vertices)
    if extra.any():
        raise block.fault(
            int(np.argmax(extra)),
            f"a line for vertex {header.vertices + 1}, expected {header.vertices}; "
            "the header is wrong",
        )
    is_vertex = (vertex >= 0) & (vertex < header.vertices)
    short = is_vertex & (per_line < header.skipped)
    odd = is_vertex & ((per_line - header.skipped) % 2 == 1) & header.weighted
    if short.any():
        line = int(np.argmax(short))
        problem = f"expected at least {header.skipped} of vertex size and weights"
        raise block.fault(line, f"found {per_line[line]} words, {problem}")
    if odd.any():
        line = int(np.argmax(odd))
        problem = f"expected {header.skipped} and then pairs of neighbour and edge weight"
        raise block.fault(line, f"found {per_line[line]} words, {problem}")


def _neighbours(
    block: Block, words: Words, vertex: npt.NDArray[np.int64], header: _Header
) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
    """Return the row, the column and the value of each neighbour in a block, rows from 0."""
    counts = words.per_line()
    first = np.cumsum(counts) - counts
    position = np.arange(len(words.values)) - first[words.lines] - header.skipped
    step = 2 if header.weighted else 1
    is_neighbour = (position >= 0) & (position % step == 0)
    place = np.flatnonzero(is_neighbour)
    found, lines = words.values[place], words.lines[place]
    wrong = ~((found >= 1) & (found <= header.vertices) & (found == np.floor(found)))
    if wrong.any():
        entry = int(np.argmax(wrong))
        raise block.fault(
            int(lines[entry]),
            f"neighbour {found[entry]:.15g} is outside 1..{header.vertices}; "
            "the file is damaged or its header is wrong",
        )
    values = words.values[place + 1].astype(np.float64) if header.weighted else np.ones(len(place))
    return vertex[lines], found.astype(np.int64) - 1, values
