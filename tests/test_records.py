# SPDX-License-Identifier: Apache-2.0
"""Run records: every demonstration and every committed result obeys one schema."""

import json
import re
import socket
import subprocess
import sys

import pytest

HOME_PATH = re.compile(r"/(?:home|root|Users)/|[A-Z]:\\\\Users")
DEMO_LIMIT_S = 600
"""Three times what a demonstration may take on two cores, for a machine that is busy."""


def check_record(text, member):
    """Check one ``run.json`` and return it."""
    record = json.loads(text)
    pytest.importorskip("tenfold_core.run").validate(record)
    assert record["package"] == member.name
    assert record["metrics"], "a record without a figure shows nothing"
    assert not HOME_PATH.search(text)
    return record


def test_committed_records_obey_the_schema_and_name_no_machine(root, member):
    pytest.importorskip("tenfold_core")
    results = root / member.path / "benchmarks" / "results"
    files = sorted(results.rglob("run.json"))
    if not files:
        pytest.skip(f"{member.name} has no committed results")
    for file in files:
        record = check_record(file.read_text(encoding="utf-8"), member)
        assert record["status"] in {"done", "failed"}, f"{file}: an unfinished run was committed"
        for artefact in record["artefacts"]:
            assert not artefact["path"].startswith(("/", "..")), file


@pytest.mark.slow
def test_the_demonstration_leaves_one_sound_record(installed_member, tmp_path):
    if not installed_member.scripts:
        pytest.skip(f"{installed_member.name} has no command")
    out = tmp_path / "out"
    command = [sys.executable, "-m", installed_member.module, "demo"]
    command += ["--out", str(out), "--json", "--quiet"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=DEMO_LIMIT_S
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1, "--json prints exactly one line"
    json.loads(result.stdout)
    assert "\x1b" not in result.stdout + result.stderr

    text = (out / "run.json").read_text(encoding="utf-8")
    record = check_record(text, installed_member)
    assert record["status"] == "done"
    assert record["version"] == installed_member.version
    hostname = socket.gethostname()
    if len(hostname) > 3:
        assert hostname not in text
    assert {path.name for path in tmp_path.iterdir()} == {"out"}, "demo writes to --out only"
