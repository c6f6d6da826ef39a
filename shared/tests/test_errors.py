# SPDX-License-Identifier: Apache-2.0
import pytest
from tenfold_core import errors


@pytest.mark.parametrize(
    ("kind", "exit_code", "also"),
    [
        (errors.TenfoldError, 1, Exception),
        (errors.ConfigError, 2, errors.TenfoldError),
        (errors.InputError, 2, ValueError),
        (errors.MissingExtraError, 2, ImportError),
        (errors.CheckpointError, 2, errors.TenfoldError),
        (errors.DivergedError, 1, errors.TenfoldError),
    ],
)
def test_each_error_has_its_exit_code_and_base(kind, exit_code, also):
    assert kind.exit_code == exit_code
    assert issubclass(kind, also)
    assert str(kind("a.mtx:3: found x, expected y")) == "a.mtx:3: found x, expected y"


def test_config_error_is_no_value_error_so_that_the_parser_lets_it_pass():
    assert not issubclass(errors.ConfigError, ValueError)
