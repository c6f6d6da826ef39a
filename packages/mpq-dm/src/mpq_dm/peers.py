# SPDX-License-Identifier: Apache-2.0
"""Other quantization libraries by their own public functions, for comparisons.

None of them is needed by anything else: they come with the extra `[bench]`. All round weights
without data, per layer; what differs is which layers, how rows are grouped, and whether products
are of integers:

- torchao quantizes linear layers only; `int8-dynamic` rounds their inputs as they come.
- optimum-quanto rounds linear layers and convolutions, in groups of 128 below 8 bits.
- SDNQ rounds both, in groups it chooses. By default it leaves small layers alone; here it is told
  to take them, since the model of the demonstration has no others.
"""

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

import torch
from tenfold_core.errors import ConfigError, MissingExtraError
from torch import Tensor, nn

__all__ = ["PEERS", "Peer", "quantized_by", "stored_bytes", "tensor_bytes", "versions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A library's way to quantize a model, in place."""

    distribution: str
    bits: int
    """Of a weight, as the library calls it; scales come on top."""
    quantize: Callable[[nn.Module], Any]
    """Returns the model, or None where it was changed in place."""


def versions() -> dict[str, str]:
    """Return the versions of the libraries that are installed."""
    found = {}
    for name in sorted({peer.distribution for peer in PEERS.values()}):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def quantized_by(name: str, model: nn.Module) -> Any:
    """Return a copy of a model that a peer has quantized.

    Raises:
        ConfigError: no such peer.
        MissingExtraError: its library is not installed, or does not run beside this torch.
    """
    if name not in PEERS:
        raise ConfigError(f"peer is {name!r}, expected {', '.join(PEERS)}")
    peer, changed = PEERS[name], copy.deepcopy(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels that were not built, and the like
            found = peer.quantize(changed)
    except ImportError as error:
        raise MissingExtraError(
            f"{name} needs {peer.distribution}: pip install 'mpq-dm[bench]' ({error})"
        ) from error
    return (changed if found is None else found).eval()


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, or of all tensors that it is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or type(tensor) in (Tensor, nn.Parameter):
        return tensor.nbytes
    parts = (getattr(tensor, name) for name in flatten()[0])
    return sum(tensor_bytes(part) for part in parts if isinstance(part, Tensor))


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes that `torch.save` writes of a model's state."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def _torchao_dynamic(model: nn.Module) -> None:
    torchao: Any = import_module("torchao.quantization")
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())


def _torchao_weights(bits: int) -> Callable[[nn.Module], None]:
    def quantize(model: nn.Module) -> None:
        torchao: Any = import_module("torchao.quantization")
        kind = getattr(torch, f"int{bits}")
        torchao.quantize_(model, torchao.IntxWeightOnlyConfig(weight_dtype=kind))

    return quantize


def _quanto(bits: int) -> Callable[[nn.Module], None]:
    def quantize(model: nn.Module) -> None:
        quanto: Any = import_module("optimum.quanto")
        quanto.quantize(model, weights=getattr(quanto, f"qint{bits}"))
        quanto.freeze(model)

    return quantize


def _sdnq(bits: int, *, products: bool = False) -> Callable[[nn.Module], Any]:
    def quantize(model: nn.Module) -> Any:
        sdnq: Any = import_module("sdnq")
        return sdnq.sdnq_post_load_quant(
            model, weights_dtype=f"uint{bits}" if bits < 8 else "int8", quant_conv=True,
            use_quantized_matmul=products, use_quantized_matmul_conv=products,
            minimum_allowed_numel=1, minimum_allowed_channel_size=1, add_skip_keys=False,
        )  # fmt: skip

    return quantize


PEERS: dict[str, Peer] = {
    "torchao int8-dynamic": Peer(distribution="torchao", bits=8, quantize=_torchao_dynamic),
    **{
        f"torchao int{bits}": Peer(
            distribution="torchao", bits=bits, quantize=_torchao_weights(bits)
        )
        for bits in (4, 3, 2)
    },
    **{
        f"quanto qint{bits}": Peer(distribution="optimum-quanto", bits=bits, quantize=_quanto(bits))
        for bits in (4, 2)
    },
    "sdnq int8-matmul": Peer(distribution="sdnq", bits=8, quantize=_sdnq(8, products=True)),
    **{
        f"sdnq uint{bits}": Peer(distribution="sdnq", bits=bits, quantize=_sdnq(bits))
        for bits in (4, 3, 2)
    },
}
"""Peers by name, as they are shown."""
