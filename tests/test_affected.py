# SPDX-License-Identifier: Apache-2.0
"""affected.py: which members a change can break."""

import json
import subprocess

import pytest


@pytest.fixture
def workspace(affected):
    """Three packages beside the core; ``two`` needs ``one`` through an extra."""

    def member(name, path, requirements=(), extras=None):
        return affected.Member(
            name=name,
            version="1.0",
            path=path,
            module=name.replace("-", "_"),
            requirements=tuple(requirements),
            extras=extras or {},
            scripts={},
        )

    return [
        member("tenfold-core", "shared"),
        member("one", "packages/one", ["tenfold-core>=0.1"]),
        member("one-more", "packages/one-more", ["tenfold-core[torch]>=0.1"]),
        member("two", "packages/two", [], {"all": ("One>=1",), "cuda12": ("cupy>=1",)}),
    ]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ([], []),
        (["packages/one-more/src/one_more/cli.py"], ["one-more"]),
        (["packages/one/README.md"], ["one", "two"]),
        (["packages/two/pyproject.toml", "packages/one-more/a"], ["one-more", "two"]),
        (["shared/src/tenfold_core/errors.py"], ["tenfold-core", "one", "one-more", "two"]),
        (["uv.lock"], ["tenfold-core", "one", "one-more", "two"]),
        (["packages/gone/x.py"], ["tenfold-core", "one", "one-more", "two"]),
        (
            ["packages/one/x", ".github/workflows/ci.yml"],
            ["tenfold-core", "one", "one-more", "two"],
        ),
    ],
)
def test_a_change_affects_its_package_and_the_dependants(affected, workspace, changed, expected):
    assert [member.name for member in affected.affected(workspace, changed)] == expected


def test_the_members_of_this_workspace_are_found_core_first(affected, root):
    found = affected.members(root)
    assert found[0].name == "tenfold-core"
    folders = sorted(path.parent.name for path in root.glob("packages/*/pyproject.toml"))
    assert [member.name for member in found[1:]] == folders


def test_cuda_extras_are_left_out_on_test_machines(affected, workspace):
    assert workspace[3].test_extras == ("all",)
    assert workspace[3].editable == "packages/two[all]"
    assert workspace[1].editable == "packages/one"


def test_matrix_pairs_every_member_with_every_python(affected, workspace):
    values = affected.outputs(workspace[1:3], ["3.11", "3.15"])
    assert json.loads(values["matrix"])["include"] == [
        {"package": "one", "python": "3.11"},
        {"package": "one", "python": "3.15"},
        {"package": "one-more", "python": "3.11"},
        {"package": "one-more", "python": "3.15"},
    ]
    assert values["packages"] == "one one-more"
    assert values["keyword"] == "one or one-more"
    assert values["any"] == "true"
    assert affected.outputs([], ["3.11"])["any"] == "false"


def test_changed_files_compare_with_the_merge_base(affected, tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    git("init", "--quiet", "--initial-branch=main")
    git("commit", "--quiet", "--allow-empty", "--message=start")
    git("checkout", "--quiet", "-b", "topic")
    (tmp_path / "with space.txt").write_text("a")
    git("add", ".")
    git("commit", "--quiet", "--message=topic")
    git("checkout", "--quiet", "main")
    (tmp_path / "other.txt").write_text("b")
    git("add", ".")
    git("commit", "--quiet", "--message=main moves on")
    git("checkout", "--quiet", "topic")

    assert affected.changed_files("main", tmp_path) == ["with space.txt"]


@pytest.mark.parametrize("base", ["", "0" * 40, "no-such-commit"])
def test_an_unknown_base_means_that_everything_is_affected(affected, root, base):
    assert affected.changed_files(base, root) is None


def test_command_line_appends_to_the_output_file(affected, tmp_path, capsys):
    file = tmp_path / "output"
    file.write_text("before=1\n")
    assert affected.main(["--all", "--pythons", "3.11", "--github-output", str(file)]) == 0
    assert file.read_text() == "before=1\n" + capsys.readouterr().out
    assert "any=true\n" in file.read_text()


def test_description_of_one_member(affected, capsys):
    assert affected.main(["--describe", "tenfold-core"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "path=shared" in lines
    assert "module=tenfold_core" in lines


def test_shapes_are_checked_where_jaxtyping_is_always_there(affected, workspace):
    core, one, one_more, _ = workspace
    assert affected.describe(core)["jaxtyping"] == "false"
    assert affected.describe(one)["jaxtyping"] == "false"
    assert affected.describe(one_more)["jaxtyping"] == "true"


def test_an_unknown_member_is_a_usage_error_that_lists_the_known(affected, capsys):
    with pytest.raises(SystemExit, match="2"):
        affected.main(["--describe", "nothing"])
    assert "the members are tenfold-core" in capsys.readouterr().err


def test_a_requirement_without_a_name_is_refused(affected):
    assert affected.requirement_name("Tenfold_Core[torch]>=0.1") == "tenfold-core"
    with pytest.raises(ValueError, match="begin with a name"):
        affected.requirement_name(">=1")
