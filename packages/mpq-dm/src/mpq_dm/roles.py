# SPDX-License-Identifier: Apache-2.0
"""Which layers are quantized, and in which role: by their place in the model, not by substrings.

Roles: `input` and `output` are the first and last layers, `time` the embedders of timestep and
label, `skip` the shortcuts and strided downsamplers of UNets (which the published program leaves in
full precision), `body` everything else. All but `body` keep 8 bits by default and are never mixed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from mpq_dm.operators import CONVOLUTIONS, LINEAR, TRANSPOSED, to_rows

__all__ = ["ROLES", "Layer", "find_layers", "weight_rows"]

ROLES = ("input", "time", "body", "skip", "output")

_INPUT = ("conv_in", "pos_embed", "patch_embed", "x_embedder")
_OUTPUT = ("conv_out", "proj_out", "proj_out_1", "proj_out_2")
_TIME_CLASSES = (
    "TimestepEmbedding",
    "LabelEmbedding",
    "CombinedTimestepLabelEmbeddings",
    "CombinedTimestepTextProjEmbeddings",
    "CombinedTimestepGuidanceTextProjEmbeddings",
    "PixArtAlphaCombinedTimestepSizeEmbeddings",
)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer whose weight becomes codes."""

    name: str
    module: nn.Module
    role: str
    rows: int
    """Output channels n."""
    columns: int
    """Weights of a row: input channels times kernel taps, K."""
    tied_to: str | None = None
    """An earlier layer with the same weight, which is stored once."""

    @property
    def weights(self) -> int:
        """Weights of the layer."""
        return self.rows * self.columns


def weight_rows(module: nn.Module) -> Float[Tensor, "rows columns"]:
    """Return the weight with one row per output channel; a transposed convolution is turned."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return to_rows(module, weight).flatten(1)


def find_layers(model: nn.Module) -> tuple[list[Layer], list[str]]:
    """Return the layers to quantize in the order of the model, and what is left as it is.

    What is left are modules with a weight of two or more dimensions of a class not known here, as
    lines "name (Class)"; embeddings are tables and are never named.
    """
    found: list[Layer] = []
    left: list[str] = []
    seen: dict[int, str] = {}
    for name, module, ancestors in _walk(model):
        weight = getattr(module, "weight", None)
        if type(module) in (*LINEAR, *CONVOLUTIONS, *TRANSPOSED):  # a subclass may do other things
            rows = weight_rows(module)
            tied = seen.setdefault(id(weight), name)
            role = _role(name, ancestors)
            found.append(
                Layer(name, module, role, *rows.shape, tied_to=tied if tied != name else None)
            )
        elif isinstance(module, nn.Embedding):
            continue
        elif isinstance(weight, Tensor) and weight.ndim > 1:
            left.append(f"{name} ({type(module).__name__})")
    return found, left


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
    """Yield name, module and the modules above it, each module once."""

    def below(
        prefix: str, module: nn.Module, above: tuple[nn.Module, ...]
    ) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            yield path, child, (*above, module)
            yield from below(f"{path}.", child, (*above, module))

    yield from below("", model, ())


def _role(name: str, ancestors: tuple[nn.Module, ...]) -> str:
    parts = name.split(".")
    if any(type(module).__name__ in _TIME_CLASSES for module in ancestors):
        return "time"
    if parts[0] in _INPUT:
        return "input"
    if parts[0] in _OUTPUT:
        return "output"
    if parts[-1] == "conv_shortcut" or "downsamplers" in parts:
        return "skip"
    return "body"
