# SPDX-License-Identifier: Apache-2.0
"""Independent random streams from one seed, by name: adding one does not shift the others."""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from tenfold_core.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    import torch

__all__ = ["generator", "torch_generator"]


def generator(seed: int, name: str) -> np.random.Generator:
    """Return the stream ``name`` of a run, the same on every machine.

    Raises:
        ConfigError: ``seed`` is negative.

    Example:
        >>> int(generator(0, "data").integers(100)) == int(generator(0, "data").integers(100))
        True
    """
    return np.random.Generator(np.random.PCG64(_sequence(seed, name)))


def torch_generator(seed: int, name: str, device: str = "cpu") -> "torch.Generator":
    """Return the stream ``name`` as a PyTorch generator on a device.

    The same name gives other numbers than :func:`generator`, and a GPU others than the CPU.

    Raises:
        ConfigError: ``seed`` is negative.
        MissingExtraError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(
            "torch_generator needs PyTorch: pip install 'tenfold-core[torch]'"
        ) from error
    state = int(_sequence(seed, name).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state >> 1)  # a signed 64-bit number is expected


def _sequence(seed: int, name: str) -> np.random.SeedSequence:
    if seed < 0:
        raise ConfigError(f"seed is {seed}, expected a number that is not negative")
    # hash() differs between processes, so the name enters by a digest.
    digest = hashlib.sha256(name.encode()).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]
    return np.random.SeedSequence(seed, spawn_key=words)
