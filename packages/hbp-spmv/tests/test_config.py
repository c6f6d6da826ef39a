# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import asdict

import numpy as np
import pytest
from hbp_spmv import PAPER, BuildConfig, HashParams, HBPMatrix, from_csr, load
from tenfold_core.errors import ConfigError
from tenfold_core.testing.sparse import random_csr

INTEGERS = ["k0", "s", "t", "u", "height", "width", "lanes", "sigma", "strips"]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("kind", [np.int64, np.uint16])
def test_integers_of_any_type_are_settings(name, kind):
    config = BuildConfig(**{name: kind(8)})
    assert config == BuildConfig(**{name: 8})
    assert type(getattr(config, name)) is int
    assert json.loads(json.dumps(asdict(config)))[name] == 8


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [True, np.True_, 8.0, np.float64(8), "8", [8]], ids=repr)
def test_what_is_no_integer_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}: expected an int in \d+\.\.\d+, got "):
        BuildConfig(**{name: value})


@pytest.mark.parametrize("name", ["k0", "s", "t", "u", "height", "width"])
def test_only_what_the_build_chooses_may_be_none(name):
    assert BuildConfig(lanes=None, sigma=None, strips=None) == BuildConfig()
    with pytest.raises(ConfigError, match=f"{name}: expected an int .* got None"):
        BuildConfig(**{name: None})


def test_hash_parameters_are_integers_of_any_type():
    assert HashParams(k0=np.int32(3)) == HashParams(k0=3)
    assert type(HashParams(k0=np.int32(3)).k0) is int
    with pytest.raises(
        ConfigError, match=r"hash parameter 's': expected an int in 0\.\.31, got True"
    ):
        HashParams(s=True)


def test_numpy_integers_survive_a_build_and_a_file(tmp_path):
    a = random_csr(60, 50, density=0.2, seed=3).to_scipy()
    sizes = {"lanes": np.int64(8), "strips": np.int32(16), "sigma": np.uint8(64)}
    built = from_csr(a, layout="compact", threads=np.int64(2), n_products=np.int64(9), **sizes)
    assert (built.config.lanes, built.config.strips, built.config.sigma) == (8, 16, 64)
    assert type(built.threads) is int
    assert type(built.with_threads(np.uint8(1)).threads) is int
    blocks = from_csr(a, config=PAPER, block=(np.int64(32), np.int64(20)))
    sizes = {"height": np.int64(32), "width": np.int64(20), "lanes": np.int64(32)}
    for matrix in (built, blocks, HBPMatrix.from_paper(blocks.arrays(), a.shape, **sizes)):
        matrix.save(tmp_path / "m.hbp.safetensors")
        assert load(tmp_path / "m.hbp.safetensors", threads=np.int16(1)).config == matrix.config
