# SPDX-License-Identifier: Apache-2.0
import importlib.util

import numpy as np
import pytest
from hbp_spmv import gallery
from hbp_spmv.cli import main
from hbp_spmv.gallery import GALLERY, load_gallery, photograph
from hbp_spmv.inputs import matrix_sources
from tenfold_core.errors import ConfigError, MissingExtraError


@pytest.fixture
def installed():
    """Skip where the extra is absent."""
    for module in ("pyamg", "sklearn", "PIL"):
        pytest.importorskip(module, reason="needs hbp-spmv[demo]")


def test_without_the_extra_one_line_names_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    assert main(["bench", "@demo"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "hbp-spmv: error: @demo needs PyAMG and scikit-learn and Pillow: "
        "pip install 'hbp-spmv[demo]'\n"
    )
    with pytest.raises(MissingExtraError, match=r"hbp-spmv\[demo\]"):
        load_gallery("airfoil")
    with pytest.raises(MissingExtraError, match=r"hbp-spmv\[demo\]"):
        photograph(np.ones((2, 2)))


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="'nothing' is not known, expected airfoil, bar"):
        load_gallery("nothing")


def test_demo_stands_for_every_matrix_and_goes_with_files(monkeypatch, tmp_path):
    monkeypatch.setattr(gallery, "_installed", lambda module: True)
    (tmp_path / "x.mtx").write_text("%%MatrixMarket matrix coordinate real general\n1 1 1\n1 1 2\n")
    found = matrix_sources([str(tmp_path), "@demo"])
    assert [source.name for source in found] == ["x", *GALLERY]
    assert len({source.identity for source in found}) == len(found)
    assert found[0].load().toarray().tolist() == [[2.0]]


def test_the_laplacian_of_a_photograph_by_hand(installed):
    # 1 0      differences: horizontal 1 and 0, vertical 0 and 1, each twice; deviation 1/2
    # 1 1 -> pixels 0..3: edges 01 (1), 23 (0), 02 (0), 13 (1) weigh exp(-2), 1, 1, exp(-2)
    far = np.exp(-2.0)
    expected = [
        [1 + far, -far, -1, 0],
        [-far, 2 * far, 0, -far],
        [-1, 0, 2, -1],
        [0, -far, -1, 1 + far],
    ]
    np.testing.assert_allclose(photograph(np.array([[1, 0], [1, 1]])).toarray(), expected)


@pytest.mark.parametrize("name", GALLERY)
def test_every_matrix_is_canonical_and_square(installed, name):
    a = load_gallery(name)
    assert a.has_canonical_format
    assert a.shape[0] == a.shape[1]
    assert a.dtype in (np.float64, np.complex128)
    assert a.nnz > 1000


def test_the_photograph_has_five_entries_a_row_and_rows_sum_to_zero(installed):
    a = load_gallery("china")
    assert a.shape == (427 * 640,) * 2
    assert a.nnz == 5 * 427 * 640 - 2 * (427 + 640)
    assert abs(a.sum(axis=1)).max() < 1e-12
