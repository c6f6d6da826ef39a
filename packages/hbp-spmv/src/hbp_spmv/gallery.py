# SPDX-License-Identifier: Apache-2.0
"""Matrices that other packages ship, `@demo` of the benchmark: PyAMG's examples, and a photograph.

Both come with the extra `hbp-spmv[demo]`; nothing is fetched.
"""

import importlib.util

import numpy as np
from scipy.sparse import coo_array, csr_array
from tenfold_core.errors import ConfigError, MissingExtraError

from hbp_spmv.building import canonical

__all__ = ["GALLERY", "load_gallery", "photograph", "require_gallery"]

PHOTOGRAPH = "china"
GALLERY = (
    "airfoil", "bar", "helmholtz_2D", "knot", "local_disc_galerkin_diffusion", "recirc_flow",
    "unit_cube", "unit_square", PHOTOGRAPH,
)  # fmt: skip
"""Names of PyAMG's packaged examples, then the photograph."""
_MODULES = {"pyamg": "PyAMG", "sklearn": "scikit-learn", "PIL": "Pillow"}


def require_gallery() -> None:
    """Check that what brings the matrices is installed, without importing it.

    Raises:
        MissingExtraError: it is not.
    """
    lacking = [name for module, name in _MODULES.items() if not _installed(module)]
    if lacking:
        raise MissingExtraError(
            f"@demo needs {' and '.join(lacking)}: pip install 'hbp-spmv[demo]'"
        )


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def load_gallery(name: str) -> csr_array:
    """Return a matrix of `GALLERY` as canonical CSR.

    Raises:
        ConfigError: the name is unknown.
        MissingExtraError: what brings it is not installed.
    """
    if name not in GALLERY:
        raise ConfigError(f"gallery: {name!r} is not known, expected {', '.join(GALLERY)}")
    require_gallery()
    if name == PHOTOGRAPH:
        from sklearn.datasets import load_sample_image

        return photograph(load_sample_image(f"{name}.jpg").mean(axis=2))
    from pyamg.gallery import load_example

    return canonical(load_example(name)["A"])


def photograph(gray: np.ndarray) -> csr_array:
    """Return the Laplacian of the graph that joins each pixel of an image with its 4 neighbours.

    An edge weighs `exp(-d / s)`, with the difference d of its two pixels and the deviation s of all
    differences, as in spectral segmentation; a row sums to 0.

    Args:
        gray: brightness of the pixels, (height, width).

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    if not _installed("sklearn"):
        raise MissingExtraError("photograph needs scikit-learn: pip install 'hbp-spmv[demo]'")
    from sklearn.feature_extraction.image import img_to_graph

    graph = coo_array(img_to_graph(np.asarray(gray, dtype=np.float64)))
    row, column = graph.coords
    edges = row != column  # img_to_graph puts the pixels themselves on the diagonal
    row, column, difference = row[edges], column[edges], graph.data[edges]
    weight = np.exp(-difference / (difference.std() or 1.0))
    pixels = graph.shape[0]
    degree = np.bincount(row, weight, pixels)
    everyone = np.arange(pixels)
    return canonical(
        coo_array(
            (
                np.concatenate([-weight, degree]),
                (np.concatenate([row, everyone]), np.concatenate([column, everyone])),
            ),
            shape=graph.shape,
        )
    )
