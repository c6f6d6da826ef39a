# SPDX-License-Identifier: Apache-2.0
"""numba's decorator for the modules that cannot do without it, and one clear error where it fails.

Products need none of them: a host without numba multiplies with SciPy, see `building`.
"""

from collections.abc import Callable
from typing import Any

from tenfold_core.errors import MissingExtraError

__all__ = ["njit"]


def njit(**settings: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return `numba.njit(**settings)`, imported when the first function is decorated.

    Raises:
        MissingExtraError: numba is not installed, cannot be loaded, or has no place for its cache.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            import numba

            return numba.njit(**settings)(function)
        except (ImportError, OSError, RuntimeError) as error:
            raise MissingExtraError(
                "compiled functions need numba, which does not work here "
                f"({type(error).__name__}: {error}); install it again: pip install numba"
            ) from error

    return decorate
