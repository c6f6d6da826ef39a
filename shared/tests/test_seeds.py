# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import numpy as np
import pytest
from tenfold_core.errors import ConfigError, MissingExtraError
from tenfold_core.run import generator, torch_generator


def test_a_stream_repeats_and_does_not_depend_on_others():
    first = generator(7, "data").random(4)
    generator(7, "noise").random(100)
    np.testing.assert_array_equal(generator(7, "data").random(4), first)


def test_names_and_seeds_give_other_numbers():
    numbers = {generator(seed, name).random() for seed in (0, 1) for name in ("", "a", "b")}
    assert len(numbers) == 6


def test_a_stream_is_the_same_in_every_process_and_version():
    code = "from tenfold_core.run import generator; print(generator(3, 'x').integers(10**9))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == generator(3, "x").integers(10**9) == 626022873


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match="seed is -1, expected a number that is not negative"):
        generator(-1, "a")


def test_torch_streams_repeat():
    torch = pytest.importorskip("torch")
    draws = [torch.rand(2, generator=torch_generator(5, name)).tolist() for name in "aab"]
    assert draws[0] == draws[1] != draws[2]


def test_without_torch_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"tenfold-core\[torch\]"):
        torch_generator(0, "a")
