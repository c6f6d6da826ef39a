# SPDX-License-Identifier: Apache-2.0
from tenfold_core.run.results import rewrite_tables

PAGE = """# Title

<!-- results: suite/claims -->
old
<!-- /results -->

A word on `<!-- results: not/this -->` in a line.
"""


def test_blocks_are_replaced_by_what_their_name_makes(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(PAGE)
    asked = []

    def table(path, name):
        asked.append((path.name, name))
        return "| new |"

    assert rewrite_tables(tmp_path, table, check=True) == 1
    assert readme.read_text() == PAGE
    assert "run 'make results'" in capsys.readouterr().err

    assert rewrite_tables(tmp_path, table) == 0
    text = readme.read_text()
    assert "<!-- results: suite/claims -->\n\n| new |\n\n<!-- /results -->" in text
    assert "old" not in text
    assert "not/this" in text
    assert asked == [("README.md", "suite/claims")] * 2
    assert rewrite_tables(tmp_path, table, check=True) == 0


def test_pages_beside_the_results_are_rewritten_too(tmp_path):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "suite.md").write_text(PAGE)

    rewrite_tables(tmp_path, lambda path, name: f"{path.name} {name}")

    assert "suite.md suite/claims" in (results / "suite.md").read_text()
