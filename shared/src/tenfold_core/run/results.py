# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown files that are made from committed results, and never edited by hand.

A table stands between ``<!-- results: NAME -->`` and ``<!-- /results -->``; whatever is there is
replaced by what a package makes of the name.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from tenfold_core.run.atomic import atomic_path

__all__ = ["rewrite_tables"]

_BLOCK = re.compile(r"^(<!-- results: (\S+) -->\n)(?:.*?)^(<!-- /results -->)$", re.M | re.S)


def rewrite_tables(folder: Path, table: Callable[[Path, str], str], *, check: bool = False) -> int:
    """Rewrite the tables in a package's README and in the pages beside its results.

    Args:
        folder: The package's folder; its results are in ``benchmarks/results``.
        table: Makes a table; takes the file it stands in and its name.
        check: Change nothing.

    Returns:
        The exit code: 1 if a table differed and ``check`` was asked for.
    """
    results = folder / "benchmarks" / "results"
    stale = []
    for path in [folder / "README.md", *sorted(results.glob("*.md"))]:
        if not path.exists():
            continue
        text = path.read_text(encoding="utf-8")

        def fresh(block: re.Match[str], path: Path = path) -> str:
            return f"{block[1]}\n{table(path, block[2]).strip()}\n\n{block[3]}"

        new = _BLOCK.sub(fresh, text)
        if new == text:
            continue
        stale.append(path)
        if not check:
            with atomic_path(path) as temporary:
                temporary.write_text(new, encoding="utf-8")
    for path in stale:
        what = "differs from the results; run 'make results'" if check else "rewritten"
        sys.stderr.write(f"{path}: {what}\n")
    return 1 if stale and check else 0
