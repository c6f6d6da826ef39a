# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("place", [0, 1])
def test_the_examples_of_the_readme_run(place, tmp_path, monkeypatch):
    pytest.importorskip("scipy", reason="the first example compares with SciPy")
    monkeypatch.chdir(tmp_path)
    block = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[place]
    exec(compile(block, README.name, "exec"), {"__name__": "readme"})


def test_the_readme_names_every_module():
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"\]\((src/[^)]+)\)", text):
        assert (README.parent / path).is_file()
