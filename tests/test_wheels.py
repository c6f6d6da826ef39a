# SPDX-License-Identifier: Apache-2.0
"""Wheels: what is inside, and that each installs and starts without the workspace."""

import email
import hashlib
import os
import subprocess
import tarfile
import zipfile

import pytest

LARGEST_WHEEL_BYTES = 1_000_000


def build(uv, root, folder):
    """Build every member as for a release and return the folder."""
    command = [uv, "build", "--quiet", "--all-packages", "--no-sources", "--out-dir", str(folder)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def dist(uv, root, tmp_path_factory):
    return build(uv, root, tmp_path_factory.mktemp("dist"))


def wheel_of(dist, member):
    return dist / f"{member.module}-{member.version}-py3-none-any.whl"


def metadata_of(wheel, member):
    with zipfile.ZipFile(wheel) as archive:
        name = f"{member.module}-{member.version}.dist-info/METADATA"
        return email.message_from_bytes(archive.read(name))


def test_a_wheel_holds_its_module_and_licence_and_little_else(dist, member):
    wheel = wheel_of(dist, member)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    information = f"{member.module}-{member.version}.dist-info"
    assert {name.partition("/")[0] for name in names} == {member.module, information}
    assert f"{member.module}/py.typed" in names
    assert f"{information}/licenses/LICENSE" in names
    assert not [name for name in names if "/tests/" in name or "/benchmarks/" in name]
    assert wheel.stat().st_size < LARGEST_WHEEL_BYTES


def test_a_source_archive_holds_tests_changelog_and_licence(dist, member):
    top = f"{member.module}-{member.version}"
    with tarfile.open(dist / f"{top}.tar.gz") as archive:
        names = archive.getnames()
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"):
        assert f"{top}/{name}" in names
    assert any(name.startswith(f"{top}/tests/test_") for name in names)
    assert not [name for name in names if "__pycache__" in name]


def test_the_metadata_names_released_versions_only(dist, member):
    metadata = metadata_of(wheel_of(dist, member), member)
    assert metadata["Name"] == member.name
    assert metadata["License-Expression"] == "Apache-2.0"
    requirements = metadata.get_all("Requires-Dist", [])
    assert not [one for one in requirements if "@" in one or "file:" in one]
    assert metadata.get_payload().strip()


def test_two_builds_give_the_same_bytes(uv, root, dist, tmp_path, affected):
    again = build(uv, root, tmp_path)
    for member in affected.members(root):
        digests = {
            hashlib.sha256(wheel_of(folder, member).read_bytes()).hexdigest()
            for folder in (dist, again)
        }
        assert len(digests) == 1, member.name


@pytest.mark.slow
def test_a_wheel_installs_alone_and_answers(uv, dist, member, tmp_path):
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in {"VIRTUAL_ENV", "PYTHONPATH", "UV_PROJECT_ENVIRONMENT"}
    }

    def run(*command):
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run(uv, "venv", "--quiet", "venv")
    binaries = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = str(binaries / "python")
    wheel = str(wheel_of(dist, member))
    run(uv, "pip", "install", "--quiet", "--python", python, "--find-links", str(dist), wheel)
    run(uv, "pip", "check", "--quiet", "--python", python)

    location = run(python, "-c", f"import {member.module} as m; print(m.__file__)")
    assert location.startswith(str(tmp_path))
    version = run(python, "-c", f"import {member.module} as m; print(m.__version__)")
    assert version.strip() == member.version
    if member.scripts:
        for name in member.scripts:
            assert member.version in run(str(binaries / name), "--version")
    else:
        assert run(python, "-m", member.module)
