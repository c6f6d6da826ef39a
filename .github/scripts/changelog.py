# SPDX-License-Identifier: Apache-2.0
"""Print one version's section of a member's CHANGELOG.md; fail if it is missing or empty.

The files follow Keep a Changelog: ``## [1.2.0] - 2026-11-30`` opens a version, ``## [Unreleased]``
collects what comes next.

Usage:
    python .github/scripts/changelog.py hbp-spmv 0.1.0
"""

import argparse
import re
import sys
from collections.abc import Sequence

from affected import ROOT, members

_HEADING = re.compile(r"^## \[(?P<version>[^\]]+)\](?: - (?P<date>\d{4}-\d{2}-\d{2}))?\s*$")
_LINK = re.compile(r"^\[[^\]]+\]: \S+$")


def section(text: str, version: str) -> str:
    """Return the body of the section of ``version``, without its heading.

    Raises:
        ValueError: there is no such section, it has no date, or it says nothing.
    """
    body: list[str] | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        heading = _HEADING.match(line)
        if body is not None:
            if line.startswith("## "):
                break
            if not _LINK.match(line):
                body.append(line)
        elif heading is not None and heading["version"] == version:
            if heading["date"] is None:
                raise ValueError(f"line {number}: expected '## [{version}] - YYYY-MM-DD'")
            body = []
    if body is None:
        raise ValueError(f"no section '## [{version}] - YYYY-MM-DD'; write it before releasing")
    if not any(line.strip() and not line.startswith("#") for line in body):
        raise ValueError(f"the section of {version} is empty; say what changes for users")
    return "\n".join(body).strip() + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", help="distribution name")
    parser.add_argument("version", help="version whose section is wanted")
    options = parser.parse_args(argv)

    member = next((one for one in members() if one.name == options.package), None)
    if member is None:
        parser.error(f"{options.package!r} is not a member of the workspace")
    file = ROOT / member.path / "CHANGELOG.md"
    try:
        sys.stdout.write(section(file.read_text(encoding="utf-8"), options.version))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{file.relative_to(ROOT)}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
