# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hbp_spmv import generate
from hbp_spmv.generate import DEMO, GENERATORS
from numpy.testing import assert_allclose, assert_array_equal
from scipy.sparse import csr_array, eye_array, kron
from tenfold_core.errors import ConfigError, InputError

SMALL = {
    "delaunay_p1": {"points": 50},
    "stencil27": {"n": 4},
    "rmat": {"scale": 6, "edge_factor": 4},
    "banded": {"n": 40, "per_row": 3, "bandwidth": 5},
    "powerlaw": {"n": 60},
    "transport": {"sources": 3, "sinks": 5},
    "stencil7": {"n": 3},
    "stencil5": {"n": 4},
}
RANDOM = ["delaunay_p1", "rmat", "banded", "powerlaw"]


@pytest.mark.parametrize("name", GENERATORS)
def test_every_generator_returns_a_canonical_float64_csr_array(name):
    matrix = GENERATORS[name](**SMALL[name])
    again = csr_array((matrix.data, matrix.indices.copy(), matrix.indptr), shape=matrix.shape)
    again.sum_duplicates()
    assert isinstance(matrix, csr_array)
    assert matrix.dtype == np.float64
    assert matrix.indices.dtype == matrix.indptr.dtype == np.int32
    assert matrix.has_canonical_format
    assert_array_equal(again.indices, matrix.indices)
    again.check_format(full_check=True)


@pytest.mark.parametrize("name", RANDOM)
def test_the_seed_alone_decides_the_matrix(name):
    first = GENERATORS[name](**SMALL[name], seed=7)
    np.random.seed(0)  # noqa: NPY002 - global state must not matter
    same = GENERATORS[name](**SMALL[name], seed=np.random.default_rng(7))
    other = GENERATORS[name](**SMALL[name], seed=8)
    assert first.data.tobytes() == same.data.tobytes()
    assert first.indices.tobytes() == same.indices.tobytes()
    assert (first != other).nnz > 0


def test_stencil5_of_a_two_by_two_grid_by_hand():
    # points 0 1 / 2 3: each has one neighbour to the side and one above or below
    expected = [[4, -1, -1, 0], [-1, 4, 0, -1], [-1, 0, 4, -1], [0, -1, -1, 4]]
    assert_array_equal(generate.stencil5(2).toarray(), expected)


def test_stencils_of_one_point_are_their_diagonal():
    assert generate.stencil5(1).toarray() == [[4]]
    assert generate.stencil7(1).toarray() == [[6]]
    assert generate.stencil27(1).toarray() == [[26]]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_stencils_agree_with_kronecker_products_of_tridiagonal_matrices(n):
    one = eye_array(n)
    path = csr_array(np.eye(n, k=1) + np.eye(n, k=-1))
    near = path + one
    plane = 4 * kron(one, one) - kron(path, one) - kron(one, path)
    assert_array_equal(generate.stencil5(n).toarray(), plane.toarray())
    faces = sum(
        kron(kron(*pair), last)
        for pair, last in (((path, one), one), ((one, path), one), ((one, one), path))
    )
    assert_array_equal(generate.stencil7(n).toarray(), (6 * eye_array(n**3) - faces).toarray())
    cube = 27 * eye_array(n**3) - kron(kron(near, near), near)
    assert_array_equal(generate.stencil27(n).toarray(), cube.toarray())


def test_p1_stiffness_on_the_unit_square_by_hand():
    # Two right triangles of area 1/2 with legs 1: each adds 1 at its right angle, 1/2 at the other
    # corners and -1/2 along the legs; its hypotenuse, the square's diagonal, adds 0.
    matrix = generate.delaunay_p1([[0, 0], [1, 0], [0, 1], [1, 1]])
    expected = [[1, -0.5, -0.5, 0], [-0.5, 1, 0, -0.5], [-0.5, 0, 1, -0.5], [0, -0.5, -0.5, 1]]
    assert_allclose(matrix.toarray(), expected, atol=1e-15)
    assert matrix.nnz == 4 + 2 * 5  # five edges, the diagonal's coupling as an explicit zero


def test_p1_stiffness_is_symmetric_and_its_rows_sum_to_zero():
    matrix = generate.delaunay_p1(300, seed=3)
    size = abs(matrix).sum(axis=1)
    assert matrix.shape == (300, 300)
    assert_array_equal(matrix.toarray(), matrix.toarray().T)
    assert (abs(matrix.sum(axis=1)) <= 1e-14 * size).all()
    assert np.linalg.eigvalsh(matrix.toarray())[1] > 0  # connected: only constants in the kernel


def test_p1_stiffness_is_exact_for_linear_functions():
    points = np.random.default_rng(0).random((40, 2))
    matrix = generate.delaunay_p1(points)
    u = 3 * points[:, 0] - 2 * points[:, 1]
    from scipy.spatial import ConvexHull

    inner = np.setdiff1d(np.arange(40), ConvexHull(points).vertices)
    bound = 1e-13 * abs(matrix).max()
    assert_allclose((matrix @ u)[inner], 0, atol=bound)


def test_rmat_keeps_the_number_of_drawn_edges():
    matrix = generate.rmat(8, 4, seed=1)
    assert matrix.shape == (256, 256)
    assert matrix.sum() == 4 * 256
    assert matrix.nnz < 4 * 256


def test_rmat_with_one_certain_quadrant_puts_all_edges_into_one_corner():
    corner = generate.rmat(3, 2, (0, 0, 1, 0), permute=False)
    assert corner.nnz == 1
    assert corner.toarray()[7, 0] == 16


def test_rmat_quadrants_have_their_probabilities():
    matrix = generate.rmat(10, 64, permute=False, seed=2).toarray()
    parts = [matrix[:512, :512], matrix[:512, 512:], matrix[512:, :512], matrix[512:, 512:]]
    shares = [part.sum() / matrix.sum() for part in parts]
    assert_allclose(shares, (0.57, 0.19, 0.19, 0.05), atol=0.01)  # 65,536 draws: sigma 0.002


def test_banded_rows_are_equally_long_and_inside_the_band():
    matrix = generate.banded(50, 6, 5, seed=4).tocoo()
    assert_array_equal(np.bincount(matrix.row, minlength=50), np.full(50, 6))
    assert abs(matrix.row - matrix.col).max() <= 5


def test_banded_can_be_as_wide_as_the_matrix():
    assert_array_equal(generate.banded(4, 4, 100).toarray() != 0, np.ones((4, 4), bool))


def test_powerlaw_has_exactly_one_row_of_half_the_columns():
    lengths = np.diff(generate.powerlaw(1000, seed=5).indptr)
    assert np.sort(lengths)[-1] == 500
    assert np.sort(lengths)[-2] <= 125
    assert lengths.min() >= 1


def test_transport_sums_what_leaves_each_source_and_reaches_each_sink():
    # shipments x = [[1, 2, 3], [4, 5, 6]]: sources ship 6 and 15, sinks get 5, 7 and 9
    matrix = generate.transport(2, 3)
    assert matrix.shape == (5, 6)
    assert_array_equal(matrix @ [1, 2, 3, 4, 5, 6], [6, 15, 5, 7, 9])


def test_demo_matrices_are_made_one_at_a_time_in_their_order(monkeypatch):
    made = []
    for name in DEMO:
        monkeypatch.setitem(
            GENERATORS, name, lambda *, seed=0, name=name: made.append((name, seed)) or name
        )
    first = next(demo := generate.demo_matrices(seed=9))
    assert (first, made) == (("delaunay_p1", "delaunay_p1"), [("delaunay_p1", 9)])
    assert [name for name, _ in demo] == list(DEMO[1:])
    assert len(DEMO) == 6


def test_suite_reads_matrix_files_by_name_and_passes_over_others(tmp_path):
    (tmp_path / "b.el").write_text("0 1\n")
    (tmp_path / "a.mtx").write_text("%%MatrixMarket matrix coordinate real general\n2 2 1\n2 1 5\n")
    (tmp_path / "README.txt").write_text("1 2\n")
    found = dict(generate.suite(tmp_path))
    assert list(found) == ["a", "b"]
    assert_array_equal(found["a"].toarray(), [[0, 0], [5, 0]])


@pytest.mark.bad_input
def test_suite_refuses_a_file_and_an_empty_folder(tmp_path):
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(InputError, match=r"x\.txt: not a folder"):
        generate.suite_paths(tmp_path / "x.txt")
    with pytest.raises(InputError, match=r"no matrix file, expected \.mtx\.gz"):
        next(generate.suite(tmp_path))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("stencil5", {"n": 0}, "stencil5: n is 0, expected at least 1"),
        ("stencil7", {"n": -1}, "stencil7: n is -1"),
        ("stencil27", {"n": 0}, "stencil27: n is 0"),
        ("rmat", {"scale": 0}, "scale is 0, expected 1 to 30"),
        ("rmat", {"edge_factor": 0}, "edge_factor is 0"),
        ("rmat", {"probabilities": (0.5, 0.5, 0.5, 0.5)}, "with sum 1"),
        ("rmat", {"probabilities": (1.5, -0.5, 0, 0)}, "none negative"),
        ("rmat", {"probabilities": (1, 0)}, "expected four"),
        ("banded", {"n": 0}, "n is 0, expected at least 1"),
        ("banded", {"n": 10, "per_row": 4, "bandwidth": 2}, "per_row is 4, expected 1 to 3"),
        ("powerlaw", {"n": 1}, "n is 1, expected at least 2"),
        ("powerlaw", {"n": 9, "shortest": 0}, "shortest is 0"),
        ("powerlaw", {"exponent": 1.0}, "exponent is 1.0"),
        ("delaunay_p1", {"points": 2}, "points is 2, expected at least 3"),
        ("transport", {"sources": 0}, "sources is 0"),
        ("transport", {"sinks": 0}, "sinks is 0"),
    ],
)
def test_settings_out_of_range_are_refused(name, arguments, text):
    with pytest.raises(ConfigError, match=text):
        GENERATORS[name](**arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("stencil5", {"n": 10**9}),
        ("stencil7", {"n": 10**6}),
        ("stencil27", {"n": 10**200}),
        ("rmat", {"scale": 30, "edge_factor": 10**6}),
        ("banded", {"n": 10**14, "per_row": 1}),
        ("powerlaw", {"n": 10**14}),
        ("delaunay_p1", {"points": 10**13}),
        ("transport", {"sources": 10**7, "sinks": 10**7}),
    ],
)
def test_a_matrix_beyond_the_memory_is_refused_before_it_is_made(name, arguments):
    with pytest.raises(ConfigError, match=rf"{name}: making it takes .* MB or more, expected at"):
        GENERATORS[name](**arguments)


def test_the_memory_of_the_machine_is_the_bound(monkeypatch):
    monkeypatch.setattr(generate, "memory_limit", lambda: 10_000)
    assert generate.stencil5(8).shape == (64, 64)  # 64 x (5 x 25 + 16) = 9024 bytes
    with pytest.raises(ConfigError, match="expected at most 0 MB, the memory"):
        generate.stencil5(9)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("points", "text"),
    [
        (np.zeros((5, 3)), r"shape \(5, 3\)"),
        (np.zeros(6), r"shape \(6,\)"),
        ([[0, 0], [1, np.nan], [0, 1]], "all finite"),
        ([[0, 0], [1, 1], [2, 2]], "on one line"),
    ],
)
def test_unusable_points_are_refused(points, text):
    with pytest.raises(InputError, match=text):
        generate.delaunay_p1(points)
