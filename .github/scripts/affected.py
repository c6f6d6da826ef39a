# SPDX-License-Identifier: Apache-2.0
"""Name the workspace members that a change can break, as a matrix for GitHub Actions.

A file under ``packages/<dist>/`` affects that member and every member that depends on it. Any
other file (the core, the lock, the root files, the workflows, the cross-package tests) affects
all. Which member depends on which is read from their own ``pyproject.toml`` files.

Usage:
    python .github/scripts/affected.py --base origin/main
    python .github/scripts/affected.py --all --github-output "$GITHUB_OUTPUT"
    python .github/scripts/affected.py --describe hbp-spmv
"""

import argparse
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.11", "3.15")
"""Oldest supported and newest released Python: the two that every change is tested on."""
UNTESTED_EXTRAS = ("cuda", "demo", "mkl")
"""Beginnings of the extras that the test machines leave out: a GPU, sample data, MKL."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One distribution of the workspace, as its ``pyproject.toml`` declares it."""

    name: str
    version: str
    path: str
    module: str
    requirements: tuple[str, ...]
    extras: dict[str, tuple[str, ...]]
    scripts: dict[str, str]

    @property
    def test_extras(self) -> tuple[str, ...]:
        """Return the extras that the test machines install."""
        return tuple(sorted(one for one in self.extras if not one.startswith(UNTESTED_EXTRAS)))

    @property
    def editable(self) -> str:
        """Return the argument of ``uv pip install -e`` for this member."""
        extras = ",".join(self.test_extras)
        return f"{self.path}[{extras}]" if extras else self.path


def requirement_name(requirement: str) -> str:
    """Return the normalised distribution name of a requirement such as ``numpy>=2``.

    Raises:
        ValueError: the text does not begin with a distribution name.
    """
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", requirement)
    if match is None:
        raise ValueError(f"requirement {requirement!r}: expected it to begin with a name")
    return re.sub(r"[-_.]+", "-", match.group(1)).lower()


def members(root: Path = ROOT) -> list[Member]:
    """Read the members of the workspace at ``root``, the core first, then by name."""
    workspace = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    found = []
    for pattern in workspace["tool"]["uv"]["workspace"]["members"]:
        for file in sorted(root.glob(f"{pattern}/pyproject.toml")):
            project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
            found.append(
                Member(
                    name=project["name"],
                    version=project["version"],
                    path=file.parent.relative_to(root).as_posix(),
                    module=project["name"].replace("-", "_"),
                    requirements=tuple(project.get("dependencies", ())),
                    extras={
                        extra: tuple(requirements)
                        for extra, requirements in project.get("optional-dependencies", {}).items()
                    },
                    scripts=dict(project.get("scripts", {})),
                )
            )
    return sorted(found, key=lambda member: (member.path.startswith("packages/"), member.name))


def dependants(workspace: Sequence[Member], names: Iterable[str]) -> set[str]:
    """Return ``names`` with every member that needs one of them, directly or through others."""
    reached = set(names)
    needs = {
        member.name: {
            requirement_name(requirement)
            for requirement in (*member.requirements, *sum(member.extras.values(), ()))
        }
        for member in workspace
    }
    while True:
        more = {name for name, required in needs.items() if required & reached} - reached
        if not more:
            return reached
        reached |= more


def affected(workspace: Sequence[Member], changed: Iterable[str]) -> list[Member]:
    """Return the members that the changed paths (relative to the root, with /) can break."""
    direct = set()
    for path in changed:
        owner = next(
            (
                member.name
                for member in workspace
                if member.path.startswith("packages/") and path.startswith(f"{member.path}/")
            ),
            None,
        )
        if owner is None:
            return list(workspace)
        direct.add(owner)
    reached = dependants(workspace, direct)
    return [member for member in workspace if member.name in reached]


def changed_files(base: str, root: Path = ROOT) -> list[str] | None:
    """List the files that differ from the merge base with ``base``; None if git cannot tell."""
    if not base or set(base) == {"0"}:
        return None
    for span in (f"{base}...HEAD", f"{base}..HEAD"):
        command = ["git", "diff", "--name-only", "--no-renames", "-z", span]
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return [path for path in result.stdout.split("\0") if path]
    return None


def matrix(selected: Sequence[Member], pythons: Sequence[str]) -> dict[str, list[dict[str, str]]]:
    """Return the GitHub Actions matrix: every selected member on every Python."""
    return {
        "include": [
            {"package": member.name, "python": python} for member in selected for python in pythons
        ]
    }


def outputs(selected: Sequence[Member], pythons: Sequence[str]) -> dict[str, str]:
    """Return the values that the job ``plan`` hands to the others."""
    return {
        "matrix": json.dumps(matrix(selected, pythons)),
        "packages": " ".join(member.name for member in selected),
        "keyword": " or ".join(member.name for member in selected),
        "any": str(bool(selected)).lower(),
    }


def describe(member: Member) -> dict[str, str]:
    """Return what the installation and test steps need to know about one member."""
    return {
        "name": member.name,
        "path": member.path,
        "module": member.module,
        "editable": member.editable,
        "extras": " ".join(member.test_extras),
        "jaxtyping": str(
            any(
                requirement_name(requirement) == "jaxtyping" or "[torch]" in requirement
                for requirement in member.requirements
            )
        ).lower(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--base", help="commit to compare with; unknown or all zeros means all")
    what.add_argument("--all", action="store_true", help="every member")
    what.add_argument("--describe", metavar="DIST", help="one member's path, module and extras")
    parser.add_argument("--pythons", nargs="+", default=list(PYTHONS), metavar="X.Y")
    parser.add_argument("--github-output", type=Path, metavar="FILE", help="append to FILE")
    options = parser.parse_args(argv)

    workspace = members()
    if options.describe is not None:
        one = next((member for member in workspace if member.name == options.describe), None)
        if one is None:
            known = ", ".join(member.name for member in workspace)
            parser.error(f"{options.describe!r} is not a member; the members are {known}")
        values = describe(one)
    else:
        changed = None if options.all else changed_files(options.base)
        selected = list(workspace) if changed is None else affected(workspace, changed)
        values = outputs(selected, options.pythons)
    lines = "".join(f"{name}={value}\n" for name, value in values.items())
    if options.github_output is not None:
        with options.github_output.open("a", encoding="utf-8") as stream:
            stream.write(lines)
    sys.stdout.write(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
