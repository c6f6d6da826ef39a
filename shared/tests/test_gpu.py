# SPDX-License-Identifier: Apache-2.0
import shutil

import pytest
from tenfold_core import device
from tenfold_core.errors import ConfigError
from tenfold_core.run import generator, measure, torch_generator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no CUDA device"),
]


@pytest.fixture(params=["cupy", "torch"])
def product(request):
    """A product of 2048 x 2048 on the GPU, in either library, that returns its result."""
    library = pytest.importorskip(request.param)
    host = generator(0, "gpu").standard_normal((2048, 2048)).astype("float32")
    array = library.asarray(host)
    array = array.cuda() if request.param == "torch" else array
    return lambda: array @ array


def test_events_and_a_waiting_host_clock_agree(product):
    import torch

    by_events = measure(product, device="cuda", min_time_s=0.1)
    by_clock = measure(product, sync=torch.cuda.synchronize, min_time_s=0.1)
    assert by_events.median == pytest.approx(by_clock.median, rel=0.5)
    assert by_events.median > 1e-5  # 17 GFLOP take more than that


def test_a_product_nobody_waits_for_is_not_timed(product):
    with pytest.raises(ConfigError, match="returned an array on a GPU"):
        measure(product)


@pytest.mark.parametrize("via", ["cupy", "torch"])
def test_auto_finds_the_gpu(via):
    pytest.importorskip(via)
    assert str(device.resolve("auto", via=via)) == "cuda:0"
    with pytest.raises(ConfigError, match="CUDA devices"):
        device.resolve("cuda:99", via=via)


def test_torch_streams_exist_on_the_gpu():
    torch = pytest.importorskip("torch")
    draws = [
        torch.rand(3, device="cuda", generator=torch_generator(1, "a", "cuda")).tolist()
        for _ in range(2)
    ]
    assert draws[0] == draws[1]
