# SPDX-License-Identifier: Apache-2.0
"""changelog.py: the section of one version."""

import pytest

TEXT = """\
# Changelog

## [Unreleased]

## [0.2.0] - 2026-11-30

### Added

- A thing.

## [0.1.1] - 2026-11-02

### Fixed

## [0.1.0]

- First.

[0.2.0]: compare/0.2.0
"""


def test_a_section_ends_where_the_next_begins(changelog):
    assert changelog.section(TEXT, "0.2.0") == "### Added\n\n- A thing.\n"


def test_link_definitions_at_the_end_are_not_part_of_the_last_section(changelog):
    text = "## [1.0.0] - 2026-01-01\n- All.\n\n[1.0.0]: compare/1.0.0\n"
    assert changelog.section(text, "1.0.0") == "- All.\n"


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("0.3.0", r"no section '## \[0\.3\.0\]"),
        ("0.2", "no section"),
        ("0.1.1", r"the section of 0\.1\.1 is empty"),
        ("0.1.0", "line 15: expected"),
        ("Unreleased", "line 3: expected"),
    ],
)
def test_a_section_that_cannot_be_released_is_an_error(changelog, version, message):
    with pytest.raises(ValueError, match=message):
        changelog.section(TEXT, version)


def test_a_missing_version_exits_with_one_line(changelog, capsys):
    assert changelog.main(["tenfold-core", "99.0.0"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("shared/CHANGELOG.md: ")
    assert len(captured.err.splitlines()) == 1


def test_an_unknown_package_is_a_usage_error(changelog):
    with pytest.raises(SystemExit, match="2"):
        changelog.main(["nothing", "1.0.0"])
