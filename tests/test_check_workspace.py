# SPDX-License-Identifier: Apache-2.0
"""check_workspace.py: ranges between members and the common layout."""

import dataclasses

import pytest


@pytest.mark.parametrize(
    ("specifier", "version", "expected"),
    [
        (">=0.1,<0.2", "0.1.0", True),
        (">=0.1,<0.2", "0.1.9.post1", True),
        (">=0.1,<0.2", "0.2.0", False),
        (">=0.1,<0.2", "0.2.0rc1", False),
        (">=0.1,<0.2", "0.1.1rc1", False),
        (">=0.1", "0.3", True),
        (">=0.2.0rc1,<0.3", "0.2.0rc2", True),
        (">=0.2.0rc1,<0.3", "0.2.0b9", False),
        (">=0.2.0rc1,<0.3", "0.3.0rc1", False),
        ("<0.2.0rc2,>=0.1", "0.2.0rc1", True),
        (">0.1", "0.1.post1", False),
        (">0.1", "0.1.0.0", False),
        ("~=0.1.2", "0.1.9", True),
        ("~=0.1.2", "0.2", False),
        ("~=0.1.2", "0.1.1", False),
        ("==0.1.*", "0.1.7", True),
        ("==0.1.*", "0.2", False),
        ("!=0.1.3,>=0.1", "0.1.3", False),
        ("!=0.1.*", "0.2", True),
        ("<=0.1", "0.1.0", True),
        ("", "1.0", True),
    ],
)
def test_ranges_take_versions_as_pep_440_says(check_workspace, specifier, version, expected):
    assert check_workspace.allows(specifier, version) is expected


def test_versions_are_ordered_as_pep_440_says(check_workspace):
    ordered = ["1.dev1", "1a1", "1a2", "1b1", "1rc1.dev2", "1rc1", "1", "1.post1", "1.0.1", "1.1"]
    assert sorted(reversed(ordered), key=check_workspace.version_key) == ordered
    assert check_workspace.version_key("1.0") == check_workspace.version_key("1")


def test_something_else_than_a_version_is_refused(check_workspace):
    with pytest.raises(ValueError, match="'next': expected digits and dots"):
        check_workspace.version_key("next")


@pytest.fixture
def workspace(affected):
    core = affected.Member(
        name="tenfold-core",
        version="0.2.0",
        path="shared",
        module="tenfold_core",
        requirements=("numpy>=2.0",),
        extras={"torch": ("torch>=2.6",)},
        scripts={},
    )
    method = dataclasses.replace(
        core,
        name="one",
        path="packages/one",
        module="one",
        requirements=("tenfold-core>=0.2,<0.3", "scipy>=1.13 ; python_version > '3.11'"),
        extras={"all": ("one[torch]",)},
        scripts={"one": "one.cli:main"},
    )
    return [core, method]


def test_sound_ranges_are_accepted(check_workspace, workspace):
    assert list(check_workspace.range_problems(workspace)) == []


@pytest.mark.parametrize(
    ("requirement", "message"),
    [
        ("tenfold-core>=0.1,<0.2", "does not take tenfold-core 0.2.0"),
        ("tenfold-core>=0.2", "upper bound on the core"),
        ("scipy", "expected a floor"),
        ("scipy>=1.13,<2", "only the core has an upper bound"),
        ("scipy @ https://example.org/scipy.whl", "depends on an address"),
        ("two>=1", "a method never depends on another"),
    ],
)
def test_an_unsound_range_is_named(check_workspace, workspace, requirement, message):
    core, method = workspace
    two = dataclasses.replace(method, name="two", requirements=(), extras={})
    broken = dataclasses.replace(method, requirements=(requirement,))
    found = list(check_workspace.range_problems([core, broken, two]))
    assert len(found) == 1
    assert message in found[0]
    assert requirement in found[0]


def test_a_member_that_the_root_forgets_is_named_with_the_remedy(check_workspace, workspace):
    core, method = workspace
    method = dataclasses.replace(method, extras={"cuda12": ("cupy-cuda12x>=13",)})
    configuration = {
        "project": {"dependencies": ["one", "two"]},
        "tool": {
            "uv": {"sources": {"tenfold-core": {"workspace": True}}, "conflicts": []},
            "importlinter": {
                "root_packages": ["tenfold_core"],
                "contracts": [{"type": "layers", "layers": ["other | another", "tenfold_core"]}],
            },
        },
    }
    found = list(check_workspace.root_problems([core, method], configuration))
    assert found == [
        "pyproject.toml: add 'one = { workspace = true }' to the sources",
        "pyproject.toml: add 'one' to the import-linter root_packages",
        "pyproject.toml: add 'one' to the import-linter layers",
        "pyproject.toml: declare one[cuda12] among the conflicts",
        "pyproject.toml: 'two' is not a member of the workspace",
    ]


def test_a_bare_run_stays_light(check_workspace, workspace):
    core, method = workspace
    heavy = dataclasses.replace(
        method, requirements=("tenfold-core[torch]>=0.2,<0.3", "polars>=1.30")
    )
    configuration = {
        "project": {"dependencies": ["one"]},
        "tool": {
            "uv": {
                "sources": {name: {"workspace": True} for name in ("tenfold-core", "one")},
                "conflicts": [],
            },
            "importlinter": {
                "root_packages": ["tenfold_core", "one"],
                "contracts": [{"type": "layers", "layers": ["one", "tenfold_core"]}],
            },
        },
    }
    found = list(check_workspace.root_problems([core, heavy], configuration))
    assert found == [
        "pyproject.toml: a bare 'uv run' would install polars through one",
        "pyproject.toml: a bare 'uv run' would install torch through one",
    ]


def test_missing_files_and_foreign_settings_are_named(check_workspace, workspace, tmp_path):
    method = workspace[1]
    (tmp_path / "packages/one/src/one").mkdir(parents=True)
    (tmp_path / "LICENSE").write_text("licence")
    (tmp_path / "packages/one/LICENSE").write_text("another licence")
    project = {
        "project": {"license": "MIT"},
        "tool": {"ruff": {}, "uv": {"sources": {"scipy": {"path": "x"}}}},
    }
    found = list(check_workspace.member_problems(tmp_path, method, project))
    assert found == [
        "packages/one/README.md: missing",
        "packages/one/CHANGELOG.md: missing",
        "packages/one/src/one/__init__.py: missing",
        "packages/one/src/one/py.typed: missing",
        "packages/one/pyproject.toml: expected license = 'Apache-2.0'",
        "packages/one/pyproject.toml: [tool.ruff] belongs in the root pyproject.toml",
        "packages/one/pyproject.toml: sources belong in the root pyproject.toml",
        "packages/one/LICENSE: differs from the root's",
    ]


def test_folder_name_and_command_are_one_name(check_workspace, workspace, tmp_path):
    method = dataclasses.replace(workspace[1], path="packages/other", scripts={"run-one": "one:x"})
    project = {"project": {"license": "Apache-2.0"}}
    found = "\n".join(check_workspace.member_problems(tmp_path, method, project))
    assert "name 'one' is not the folder's name" in found
    assert "expected a command named 'one'" in found


def test_settings_that_must_agree_are_compared(check_workspace):
    one = {"project": {"requires-python": ">=3.11"}, "build-system": {"requires": ["a"]}}
    two = {"project": {"requires-python": ">=3.12"}, "build-system": {"requires": ["a"]}}
    assert list(check_workspace.uniformity_problems({"one": one, "two": one})) == []
    assert list(check_workspace.uniformity_problems({"one": one, "two": two})) == [
        "requires-python differs between members: one: >=3.11; two: >=3.12"
    ]


def test_actions_are_pinned_and_uv_is_within_the_build_range(check_workspace, tmp_path):
    (tmp_path / ".github/workflows").mkdir(parents=True)
    (tmp_path / ".github/workflows/x.yml").write_text(
        "steps:\n"
        "  - uses: ./.github/actions/setup\n"
        f"  - uses: some/action@{'a' * 40} # v1.2.3\n"
        f"  - uses: some/action@{'b' * 40}\n"
        "  - uses: some/action@v3\n"
        "    with:\n"
        '      version: "0.14.0"\n'
    )
    assert list(check_workspace.workflow_problems(tmp_path, ">=0.13,<0.14")) == [
        f".github/workflows/x.yml: some/action@{'b' * 40} lacks its version in a comment, "
        "e.g. # v1.2.3",
        ".github/workflows/x.yml: some/action@v3 is not pinned by a commit",
        ".github/workflows/x.yml: uv 0.14.0 is outside uv_build>=0.13,<0.14 of the members",
    ]


def test_specifier_of_a_requirement_leaves_name_extras_and_marker_out(check_workspace):
    specifier = check_workspace.specifier_of("tenfold-core[torch] >=0.1,<0.2 ; os_name == 'nt'")
    assert specifier == ">=0.1,<0.2"
