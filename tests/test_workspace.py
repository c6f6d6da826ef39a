# SPDX-License-Identifier: Apache-2.0
"""The workspace: its rules, its workflows, and imports that are not declared."""

import ast
import importlib.util
import os
import subprocess
import sys
import tomllib

import pytest

TOP_LEVEL = {
    ".ci",
    ".github",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CITATION.cff",
    "LICENSE",
    "Makefile",
    "README.md",
    "packages",
    "pyproject.toml",
    "shared",
    "tests",
    "uv.lock",
}
IMPORT_NAMES = {
    "cupy-cuda12x": {"cupy", "cupyx"},
    "cupy-cuda13x": {"cupy", "cupyx"},
    "matplotlib": {"matplotlib", "cycler", "mpl_toolkits"},
    "numba": {"numba", "llvmlite"},
    "pillow": {"PIL"},
    "pyyaml": {"yaml"},
    "scikit-learn": {"sklearn"},
    "torch": {"torch", "triton"},
}
"""Modules that a distribution gives, where it is not its own name with ``_`` for ``-``."""
TEST_TOOLS = {"pytest", "_pytest", "hypothesis", "xdist"}
"""What ``tenfold_core.testing`` may import without declaring it: only tests load it."""


def imported_modules(tree):
    """Return the top-level names that a module imports, at any depth of its code."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def declared_modules(affected, member, members):
    """Return the import names that a member's dependencies and extras give it."""
    known = {one.name: one for one in members}
    names = set()
    waiting = [*member.requirements, *sum(member.extras.values(), ())]
    while waiting:
        requirement = waiting.pop()
        name = affected.requirement_name(requirement)
        names |= IMPORT_NAMES.get(name, {name.replace("-", "_")})
        if name in known and name != member.name:
            bracket = requirement.partition("[")[2].partition("]")[0]
            waiting += known[name].requirements
            for extra in filter(None, bracket.replace(" ", "").split(",")):
                waiting += known[name].extras[extra]
    return names


def test_the_members_fit_together(check_workspace, root):
    assert check_workspace.problems(root) == []


def test_the_top_level_holds_what_the_layout_names_and_nothing_else(root):
    listed = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    assert {line.partition("/")[0] for line in listed.stdout.splitlines()} <= TOP_LEVEL


@pytest.mark.skipif("CI" not in os.environ, reason="outside CI a part may be installed")
def test_every_member_is_installed_in_ci(member):
    assert importlib.util.find_spec(member.module) is not None, (
        f"{member.name} is not installed, so its tests were skipped; use uv run --all-packages"
    )


def test_every_import_is_declared(affected, root, member):
    members = affected.members(root)
    allowed = declared_modules(affected, member, members) | {member.module}
    undeclared = []
    for file in sorted((root / member.path / "src").rglob("*.py")):
        names = imported_modules(ast.parse(file.read_text(encoding="utf-8"), filename=str(file)))
        names -= allowed | sys.stdlib_module_names
        if "testing" in file.relative_to(root / member.path / "src").parts:
            names -= TEST_TOOLS
        undeclared += [f"{file.relative_to(root).as_posix()}: {name}" for name in sorted(names)]
    assert undeclared == []


def test_test_folders_have_no_init_file(root):
    found = [*root.glob("tests/__init__.py"), *root.glob("*/tests/__init__.py")]
    assert [*found, *root.glob("packages/*/tests/__init__.py")] == []


def test_the_lock_names_one_index_and_no_path_outside(root):
    lock = tomllib.loads((root / "uv.lock").read_text(encoding="utf-8"))
    sources = [package["source"] for package in lock["package"]]
    registries = {source["registry"] for source in sources if "registry" in source}
    assert len(registries) == 1
    local = {source.get("editable") or source.get("virtual") for source in sources} - {None}
    assert all(not path.startswith(("/", "..")) for path in local)
    assert not [source for source in sources if {"git", "url", "path", "directory"} & set(source)]


def yaml_files(root):
    return [
        *sorted((root / ".github").rglob("*.yml")),
        root / ".pre-commit-config.yaml",
        root / "CITATION.cff",
    ]


def test_every_yaml_file_parses(root):
    yaml = pytest.importorskip("yaml")
    for file in yaml_files(root):
        assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict), file


def workflows(root):
    yaml = pytest.importorskip("yaml")
    return {
        file.name: yaml.safe_load(file.read_text(encoding="utf-8"))
        for file in sorted((root / ".github" / "workflows").glob("*.yml"))
    }


def test_workflows_read_only_by_default_and_every_job_ends(root):
    for name, workflow in workflows(root).items():
        assert workflow["permissions"] == {"contents": "read"}, name
        for job_name, job in workflow["jobs"].items():
            assert "uses" in job or "timeout-minutes" in job, f"{name}: {job_name}"


def test_no_checkout_keeps_the_credentials(root):
    for name, workflow in workflows(root).items():
        for job in workflow["jobs"].values():
            for step in job.get("steps", ()):
                if step.get("uses", "").startswith("actions/checkout@"):
                    assert step["with"]["persist-credentials"] is False, name


def test_no_expression_is_pasted_into_a_shell_line(root):
    for name, workflow in workflows(root).items():
        for job in workflow["jobs"].values():
            for step in job.get("steps", ()):
                assert "${{" not in step.get("run", ""), f"{name}: {step.get('name')}"


def test_the_gate_waits_for_every_job_and_the_trigger_has_no_path_filter(root):
    workflow = workflows(root)["ci.yml"]
    gate = workflow["jobs"]["gate"]
    assert gate["if"] == "always()"
    assert set(gate["needs"]) == set(workflow["jobs"]) - {"gate"}
    triggers = workflow[True]  # YAML 1.1 reads the key `on` as a boolean
    assert all("paths" not in (options or {}) for options in triggers.values())


def test_only_the_publishing_job_may_ask_for_an_identity(root):
    holders = [
        (name, job_name)
        for name, workflow in workflows(root).items()
        for job_name, job in workflow["jobs"].items()
        if "id-token" in job.get("permissions", {})
    ]
    assert holders == [("release.yml", "publish")]
    publish = workflows(root)["release.yml"]["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"] == "pypi"


def test_a_release_is_on_main_and_works_with_the_published_core(root):
    steps = workflows(root)["release.yml"]["jobs"]["build"]["steps"]
    (checkout,) = (s for s in steps if s.get("uses", "").startswith("actions/checkout@"))
    assert checkout["with"]["fetch-depth"] == 0
    lines = [line.strip() for step in steps for line in step.get("run", "").splitlines()]
    assert "if ! git merge-base --is-ancestor HEAD origin/main; then" in lines
    assert 'smoke --find-links core "$archive"' in lines
    assert 'smoke "$archive"' in lines


def test_coverage_has_a_floor(root):
    steps = workflows(root)["_package.yml"]["jobs"]["test"]["steps"]
    (step,) = (step for step in steps if "--cov " in step.get("run", ""))
    assert '--cov-fail-under "$FLOOR"' in step["run"]
    assert step["env"]["FLOOR"] == "${{ inputs.package == 'tenfold-core' && '95' || '85' }}"
