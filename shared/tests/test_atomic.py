# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from tenfold_core.errors import InputError
from tenfold_core.run import atomic_directory, atomic_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_nothing_else_remains(tmp_path):
    target = tmp_path / "a.json"
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".json"
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(tmp_path) == ["a.json"]


def test_a_failure_keeps_the_old_file_and_removes_the_new_one(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")

    def interrupted():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt("stop")

    with pytest.raises(KeyboardInterrupt, match="stop"):
        interrupted()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_symbolic_link_keeps_pointing_at_its_file(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_path(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs a device file")
def test_a_device_is_written_and_not_replaced():
    with atomic_path("/dev/null") as temporary:
        temporary.write_text("gone")
    assert not Path("/dev/null").is_file()


def test_a_folder_is_no_file_name(tmp_path):
    with pytest.raises(InputError, match="is a folder"), atomic_path(tmp_path):
        pass


@pytest.mark.parametrize("writer", [atomic_path, atomic_directory])
def test_a_missing_parent_is_named(tmp_path, writer):
    missing = writer(tmp_path / "no" / "a")
    with pytest.raises(InputError, match="no does not exist; create it first"), missing:
        pass


def test_a_folder_appears_whole(tmp_path):
    with atomic_directory(tmp_path / "run") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "x").write_text("1")
    assert (tmp_path / "run" / "sub" / "x").read_text() == "1"
    assert names(tmp_path) == ["run"]


def test_a_folder_is_replaced_only_when_asked(tmp_path):
    with atomic_directory(tmp_path / "run") as temporary:
        (temporary / "old").touch()
    with pytest.raises(InputError, match="exists already"), atomic_directory(tmp_path / "run"):
        pass
    with atomic_directory(tmp_path / "run", overwrite=True) as temporary:
        (temporary / "new").touch()
    assert names(tmp_path / "run") == ["new"]
    assert names(tmp_path) == ["run"]


def test_a_failure_keeps_the_old_folder(tmp_path):
    with atomic_directory(tmp_path / "run") as temporary:
        (temporary / "old").touch()
    replacement = atomic_directory(tmp_path / "run", overwrite=True)
    with pytest.raises(RuntimeError, match="stop"), replacement:
        raise RuntimeError("stop")
    assert names(tmp_path / "run") == ["old"]
    assert names(tmp_path) == ["run"]
