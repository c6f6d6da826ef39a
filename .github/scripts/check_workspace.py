# SPDX-License-Identifier: Apache-2.0
"""Check what no other tool checks: that the members of the workspace fit together.

uv does not compare the version ranges between members, so a core at 0.3 would lock and install
beside packages that ask for ``<0.2``, and only the user who installs from wheels would notice.
This script compares them, and holds the members to the rules that make them interchangeable.

Usage:
    python .github/scripts/check_workspace.py
"""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from affected import ROOT, Member, members, requirement_name

CORE = "tenfold-core"
SPDX = "SPDX-License-Identifier: Apache-2.0"
MEMBER_FILES = ("README.md", "CHANGELOG.md", "LICENSE")
LIGHT_DEPENDENCIES = frozenset({"torch", "diffusers", "transformers", "polars"})
"""Distributions that a bare ``uv run`` at the root must not install."""

_VERSION = re.compile(
    r"(?P<release>\d+(?:\.\d+)*)(?:(?P<pre>a|b|rc)(?P<pre_n>\d+))?"
    r"(?:\.post(?P<post>\d+))?(?:\.dev(?P<dev>\d+))?"
)
_CLAUSE = re.compile(r"(?P<op>~=|==|!=|>=|<=|>|<)\s*(?P<version>[^\s,;]+)")
_USES = re.compile(r"^\s*(?:-\s+)?uses:\s*(?P<action>\S+)(?P<comment>.*)$", re.MULTILINE)
_PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}")


def version_key(version: str) -> tuple:
    """Return a key that orders versions as PEP 440 does (epochs and local labels aside).

    Raises:
        ValueError: the text is not a version.
    """
    match = _VERSION.fullmatch(version)
    if match is None:
        raise ValueError(f"version {version!r}: expected digits and dots, e.g. 1.2.0 or 1.2.0rc1")
    release = [int(part) for part in match["release"].split(".")]
    while len(release) > 1 and release[-1] == 0:
        release.pop()
    never, always = -1, 1 << 30
    if match["pre"] is not None:
        pre = ("a", "b", "rc").index(match["pre"]), int(match["pre_n"])
    elif match["dev"] is not None and match["post"] is None:
        pre = never, 0
    else:
        pre = always, 0
    post = never if match["post"] is None else int(match["post"])
    dev = always if match["dev"] is None else int(match["dev"])
    return tuple(release), pre, post, dev


def is_prerelease(version: str) -> bool:
    """Tell whether a version is a development, alpha, beta or candidate release."""
    return re.search(r"(a|b|rc|\.dev)\d+", version) is not None


def allows(specifier: str, version: str) -> bool:
    """Tell whether a range such as ``>=0.1,<0.2`` takes ``version`` under PEP 440.

    A pre-release is taken only if the range names one itself, and ``<0.2`` does not take 0.2rc1.
    """
    clauses = [(match["op"], match["version"]) for match in _CLAUSE.finditer(specifier)]
    if is_prerelease(version) and not any(is_prerelease(bound) for _, bound in clauses):
        return False
    return all(_clause_allows(op, bound, version) for op, bound in clauses)


def _clause_allows(op: str, bound: str, version: str) -> bool:
    if bound.endswith(".*"):
        prefix = [int(part) for part in bound[:-2].split(".")]
        release = [int(part) for part in _VERSION.match(version)["release"].split(".")]
        release += [0] * (len(prefix) - len(release))
        return (release[: len(prefix)] == prefix) == (op == "==")
    key, limit = version_key(version), version_key(bound)
    if op == "~=":
        prefix = ".".join(_VERSION.match(bound)["release"].split(".")[:-1])
        return key >= limit and _clause_allows("==", f"{prefix}.*", version)
    if op == "<":
        same_release = key[0] == limit[0] and is_prerelease(version) and not is_prerelease(bound)
        return key < limit and not same_release
    if op == ">":
        same_release = key[0] == limit[0] and ".post" in version and ".post" not in bound
        return key > limit and not same_release
    return {"==": key == limit, "!=": key != limit, ">=": key >= limit, "<=": key <= limit}[op]


def specifier_of(requirement: str) -> str:
    """Return the version range of a requirement, without name, extras and marker."""
    return re.sub(r"^\s*[A-Za-z0-9._-]+\s*(\[[^\]]*\])?", "", requirement).split(";")[0].strip()


def range_problems(workspace: list[Member]) -> Iterator[str]:
    """Yield the dependencies whose range is missing, too wide, by address, or out of date."""
    versions = {member.name: member.version for member in workspace}
    for member in workspace:
        for requirement in (*member.requirements, *sum(member.extras.values(), ())):
            where = f"{member.path}/pyproject.toml: {requirement!r}"
            name, specifier = requirement_name(requirement), specifier_of(requirement)
            if "@" in requirement:
                yield f"{where}: depends on an address; depend on a released version"
            elif name in versions and name != CORE and name != member.name:
                yield f"{where}: a method never depends on another; move what both need to {CORE}"
            elif name == CORE:
                if not allows(specifier, versions[CORE]):
                    yield f"{where}: does not take {CORE} {versions[CORE]} of this tree; widen it"
                if "<" not in specifier:
                    yield f"{where}: expected an upper bound on the core, e.g. >=0.1,<0.2"
            elif name != member.name and not re.search(r">=|==|~=", specifier):
                yield f"{where}: expected a floor that is tested, e.g. {name}>=1.2"
            elif "<" in specifier:
                yield f"{where}: only the core has an upper bound; exclude one version by !="


def member_problems(root: Path, member: Member, project: dict) -> Iterator[str]:
    """Yield what one member lacks of the common layout."""
    where = f"{member.path}/pyproject.toml"
    for file in (
        *MEMBER_FILES,
        f"src/{member.module}/__init__.py",
        f"src/{member.module}/py.typed",
    ):
        if not (root / member.path / file).is_file():
            yield f"{member.path}/{file}: missing"
    if member.name != CORE:
        if member.path != f"packages/{member.name}":
            yield f"{where}: name {member.name!r} is not the folder's name"
        if member.name not in member.scripts:
            yield f"{where}: expected a command named {member.name!r} in [project.scripts]"
    if project["project"].get("license") != "Apache-2.0":
        yield f"{where}: expected license = 'Apache-2.0'"
    if "tool" in project and set(project["tool"]) - {"uv"}:
        tools = ", ".join(sorted(set(project["tool"]) - {"uv"}))
        yield f"{where}: [tool.{tools}] belongs in the root pyproject.toml"
    if project.get("tool", {}).get("uv", {}).get("sources"):
        yield f"{where}: sources belong in the root pyproject.toml"
    licence = root / member.path / "LICENSE"
    if licence.is_file() and licence.read_bytes() != (root / "LICENSE").read_bytes():
        yield f"{member.path}/LICENSE: differs from the root's"


def root_problems(workspace: list[Member], configuration: dict) -> Iterator[str]:
    """Yield the members that the root pyproject forgets, and what makes a bare run heavy."""
    tool = configuration["tool"]
    importlinter = tool["importlinter"]
    contracts = {contract["type"]: contract for contract in importlinter["contracts"]}
    layers = {name.strip() for layer in contracts["layers"]["layers"] for name in layer.split("|")}
    conflicting = {
        (side["package"], side["extra"]) for pair in tool["uv"]["conflicts"] for side in pair
    }
    for member in workspace:
        if tool["uv"]["sources"].get(member.name) != {"workspace": True}:
            yield f"pyproject.toml: add '{member.name} = {{ workspace = true }}' to the sources"
        if member.module not in importlinter["root_packages"]:
            yield f"pyproject.toml: add '{member.module}' to the import-linter root_packages"
        if member.module not in layers:
            yield f"pyproject.toml: add '{member.module}' to the import-linter layers"
        for extra in member.extras:
            if extra.startswith("cuda") and (member.name, extra) not in conflicting:
                yield f"pyproject.toml: declare {member.name}[{extra}] among the conflicts"
    known = {member.name: member for member in workspace}
    for requirement in configuration["project"]["dependencies"]:
        member = known.get(requirement_name(requirement))
        if member is None:
            yield f"pyproject.toml: {requirement!r} is not a member of the workspace"
            continue
        needed = {requirement_name(one) for one in member.requirements}
        for heavy in sorted(needed & LIGHT_DEPENDENCIES):
            yield f"pyproject.toml: a bare 'uv run' would install {heavy} through {member.name}"
        if any("[torch]" in one for one in member.requirements):
            yield f"pyproject.toml: a bare 'uv run' would install torch through {member.name}"


def uniformity_problems(projects: dict[str, dict]) -> Iterator[str]:
    """Yield the settings that have to be the same in all members but are not."""
    for label, read in {
        "requires-python": lambda project: project["project"]["requires-python"],
        "build-system": lambda project: str(project.get("build-system")),
    }.items():
        values = {path: read(project) for path, project in projects.items()}
        if len(set(values.values())) > 1:
            listed = "; ".join(f"{path}: {value}" for path, value in sorted(values.items()))
            yield f"{label} differs between members: {listed}"


def workflow_problems(root: Path, build_range: str) -> Iterator[str]:
    """Yield actions that are not pinned by commit and uv versions that the members forbid."""
    for file in sorted((root / ".github").rglob("*.yml")):
        text, where = file.read_text(encoding="utf-8"), file.relative_to(root).as_posix()
        for use in _USES.finditer(text):
            action, comment = use["action"], use["comment"].strip()
            if action.startswith("./"):
                continue
            if not _PINNED.fullmatch(action):
                yield f"{where}: {action} is not pinned by a commit"
            elif not re.fullmatch(r"# v\d+(\.\d+)*", comment):
                yield f"{where}: {action} lacks its version in a comment, e.g. # v1.2.3"
        for version in re.findall(r"^\s+version:\s*[\"']?(\d[\w.]*)", text, re.MULTILINE):
            if not allows(build_range, version):
                yield f"{where}: uv {version} is outside uv_build{build_range} of the members"


def licence_problems(root: Path) -> Iterator[str]:
    """Yield the tracked source files without the licence's identifier in their first lines."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    for name in sorted(path for path in listed.stdout.split("\0") if path):
        file = root / name
        if file.suffix not in {".py", ".yml", ".yaml", ".toml", ".cff"} and file.name != "Makefile":
            continue
        if not file.is_file():
            continue
        with file.open(encoding="utf-8") as stream:
            if SPDX not in stream.readline() + stream.readline():
                yield f"{name}: expected '# {SPDX}' in the first line"


def problems(root: Path = ROOT) -> list[str]:
    """Return every rule that the workspace at ``root`` breaks, one line each."""
    workspace = members(root)
    projects = {
        member.path: tomllib.loads((root / member.path / "pyproject.toml").read_text("utf-8"))
        for member in workspace
    }
    configuration = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    found = [*range_problems(workspace), *root_problems(workspace, configuration)]
    for member in workspace:
        found += member_problems(root, member, projects[member.path])
    found += uniformity_problems(projects)
    builds = {
        specifier_of(requirement)
        for project in projects.values()
        for requirement in project.get("build-system", {}).get("requires", ())
        if requirement_name(requirement) == "uv-build"
    }
    for build_range in sorted(builds):
        found += workflow_problems(root, build_range)
    found += licence_problems(root)
    return found


def main() -> int:
    """Print the problems and return the exit code."""
    found = problems()
    for problem in found:
        sys.stderr.write(f"{problem}\n")
    if not found:
        sys.stdout.write(f"workspace: {len(members())} members fit together\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
