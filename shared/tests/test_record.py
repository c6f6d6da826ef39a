# SPDX-License-Identifier: Apache-2.0
import copy
import enum
import hashlib
import json
import subprocess
import types
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from tenfold_core.errors import InputError
from tenfold_core.run import JsonlStream, RunRecord, read_jsonl, record, validate
from tenfold_core.run.rows import plain


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True)
class Config:
    rate: float
    where: Path
    names: tuple[str, ...]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


def load(folder):
    return json.loads((folder / "run.json").read_text())


def test_a_finished_run_is_a_valid_record(folder):
    config = Config(0.5, Path("m.mtx"), ("a", "b"))
    with RunRecord(folder, package="numpy", command=["x", "m.mtx"], config=config, seed=3) as run:
        run.metric("time", np.float64(0.25), unit="s", better="lower")
        run.metric("lost", float("nan"), unit="1")
        run.note("cupy: no CUDA device")
    found = load(folder)
    validate(found)
    assert found["status"] == "done"
    assert found["error"] is None
    assert found["config"] == {"rate": 0.5, "where": "m.mtx", "names": ["a", "b"]}
    assert found["metrics"]["time"] == {"value": 0.25, "unit": "s", "better": "lower"}
    assert found["metrics"]["lost"]["value"] is None
    assert found["versions"]["numpy"] == np.__version__
    assert found["device"]["logical_cores"] >= 1
    assert found["seconds"] > 0


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no"), "failed"), (KeyboardInterrupt("stop"), "interrupted")]
)
def test_a_failed_run_keeps_its_error_and_its_numbers(folder, error, status):
    run = RunRecord(folder, package="numpy", command=["x"])
    run.metric("time", 1, unit="s")
    with pytest.raises(type(error), match=str(error)), run:
        raise error
    found = load(folder)
    validate(found)
    assert (found["status"], found["error"]) == (status, f"{type(error).__name__}: {error}")
    assert found["metrics"]["time"]["value"] == 1


def test_no_home_path_is_written(folder, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/someone"))
    command = ["/home/someone/bin/x", "/home/someone2/m", "--out=/home/someone"]
    RunRecord(folder, package="numpy", command=command, config={"/home/someone": 1}).finish()
    found = load(folder)
    assert found["command"] == ["~/bin/x", "/home/someone2/m", "--out=~"]
    assert found["config"] == {"~": 1}


def test_a_home_of_one_character_replaces_nothing(folder, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    RunRecord(folder, package="numpy", command=["/a/b"]).finish()
    assert load(folder)["command"] == ["/a/b"]


def test_artefacts_are_named_relative_to_the_run_and_hashed(folder, tmp_path):
    folder.mkdir()
    (folder / "y.bin").write_bytes(b"abc")
    (tmp_path / "outside").write_bytes(b"")
    run = RunRecord(folder, package="numpy", command=["x"])
    run.artefact(folder / "y.bin")
    run.artefact(tmp_path / "outside")
    run.finish()
    inside, outside = load(folder)["artefacts"]
    assert inside == {"path": "y.bin", "sha256": hashlib.sha256(b"abc").hexdigest(), "bytes": 3}
    assert outside["path"] == (tmp_path / "outside").as_posix()
    validate(load(folder))


def change(found, path, value):
    found = copy.deepcopy(found)
    *parents, last = path
    part = found
    for name in parents:
        part = part[name]
    part[last] = value
    return found


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema"], "other/1", "schema is 'other/1'"),
        (["seed"], True, "'seed' is True, expected int or NoneType"),
        (["metrics"], [], "'metrics' is ., expected dict|expected dict"),
        (["status"], "ok", "status is 'ok'"),
        (["status"], "failed", "a failed run, and only that, carries an error"),
        (["error"], "ValueError: x", "a failed run, and only that, carries an error"),
        (["extra"], 1, "unknown fields extra"),
        (["metrics", "t"], {"value": 1}, "metric 't' needs exactly value, unit and better"),
        (["metrics", "t", "better"], "up", "metric 't' is .*, not a number or direction"),
        (["metrics", "t", "value"], True, "metric 't' is .*, not a number or direction"),
        (["artefacts"], [{"path": "a"}], "needs path, sha256 and bytes"),
    ],
)
def test_a_record_that_breaks_the_schema_is_named(folder, path, value, message):
    with RunRecord(folder, package="numpy", command=["x"]) as run:
        run.metric("t", 1, unit="s")
    with pytest.raises(InputError, match=message):
        validate(change(load(folder), path, value))


def test_a_missing_field_is_named():
    with pytest.raises(InputError, match="field 'schema' is missing"):
        validate({})


def test_plain_values_are_what_json_holds():
    mixed = {1: Colour.RED, "s": {3, 1}, "a": np.arange(2), "f": np.float32(0.5), "i": np.inf}
    expected = {"1": "red", "s": [1, 3], "a": [0, 1], "f": 0.5, "i": None}
    assert plain(mixed) == expected
    assert plain([True, None, np.bool_(False), Path("a")]) == [True, None, False, "a"]


def test_the_commit_of_a_checkout_is_recorded_and_of_a_foreign_one_is_not(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", *identity, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    source = tmp_path / "__init__.py"
    source.write_text("")
    (tmp_path / "ignored.py").write_text("")
    git("init", "-q")
    git("add", "__init__.py")
    git("commit", "-qm", "first")
    module = types.SimpleNamespace(__file__=str(source))
    monkeypatch.setitem(record.sys.modules, "some_package", module)
    assert record._commit("some-package") == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    source.write_text("x = 1")
    assert record._commit("some-package")["dirty"] is True
    module.__file__ = str(tmp_path / "ignored.py")
    assert record._commit("some-package") == {"commit": None, "dirty": None}


def test_the_commit_an_installer_noted_is_recorded(monkeypatch):
    text = json.dumps({"url": "x", "vcs_info": {"vcs": "git", "commit_id": "abc"}})
    installed = types.SimpleNamespace(read_text=lambda name: text)
    monkeypatch.setattr(metadata, "distribution", lambda name: installed)
    assert record._commit("not-imported") == {"commit": "abc", "dirty": False}


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert record._git(tmp_path, "status") is None


def test_rows_are_on_the_disk_when_append_returns(tmp_path):
    path = tmp_path / "m.jsonl"
    with JsonlStream(path) as stream:
        stream.append({"step": 1, "loss": np.float32(0.5)})
        assert read_jsonl(path) == [{"step": 1, "loss": 0.5}]
        stream.append({"step": 2, "text": "a\nb"})
    assert len(read_jsonl(path)) == 2


def test_a_half_written_row_is_ignored_and_cut_off_on_resume(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_jsonl(path) == [{"step": 1}]
    with JsonlStream(path, resume=True) as stream:
        stream.append({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    with JsonlStream(path) as stream:
        stream.append({"step": 9})
    assert read_jsonl(path) == [{"step": 9}]


def test_resume_without_a_file_or_a_whole_row_starts_at_the_beginning(tmp_path):
    with JsonlStream(tmp_path / "new.jsonl", resume=True):
        pass
    (tmp_path / "half.jsonl").write_text('{"a"')
    with JsonlStream(tmp_path / "half.jsonl", resume=True) as stream:
        stream.append({"a": 1})
    assert read_jsonl(tmp_path / "half.jsonl") == [{"a": 1}]


@pytest.mark.parametrize("line", ["{", "[1]", ""])
def test_a_bad_line_in_the_middle_is_an_error_with_its_number(tmp_path, line):
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    with pytest.raises(InputError, match=r"m\.jsonl:2: found .* expected a JSON object"):
        read_jsonl(path)
