# SPDX-License-Identifier: Apache-2.0
"""Settings: what the methods set, and what is refused."""

import pytest
from mpq_dm.config import METHODS, MPQDMConfig, method_config
from tenfold_core.errors import ConfigError


def test_defaults_are_the_published_settings():
    config = MPQDMConfig()

    assert (config.trd_weight, config.trd_window, config.trd_tau) == (100, 2, 1)
    assert (config.rank, config.weight_lr, config.act_lr) == (32, 1e-6, 5e-4)
    assert config.lora_lr == 1 / 2500
    assert config.trajectories * config.steps == 16_000


def test_every_method_is_a_valid_config():
    for name in METHODS:
        assert method_config(name).weight_bits == 2


def test_a_setting_goes_before_what_the_method_sets():
    assert method_config("rtn-mse", smooth_alpha=0.25).smooth_alpha == 0.25


def test_efficientdm_is_mpq_dm_without_its_two_parts():
    assert method_config("efficientdm") == MPQDMConfig(allocation="uniform", trd_weight=0)


def test_the_program_of_the_authors_has_its_own_switches():
    config = method_config("mpq-dm-official")

    assert config.omq_range == "official"
    assert config.trd_grad == "none"
    assert not config.omq_acts


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"act_bits": 9}, "act_bits is 9, expected 1 to 8"),
        ({"steps": 0}, "steps is 0, expected 1 to"),
        ({"smooth_alpha": 1.5}, "smooth_alpha is 1.5, expected 0 to 1"),
        ({"trd_grad": "all"}, "trd_grad is 'all', expected last, none"),
        ({"scale_method": "max"}, "scale_method is 'max', expected mse, minmax"),
        ({"weight_bits": 1}, "weight_bits is 1: mixing needs 0, 1 and 2 bits"),
        ({"trd_tau": 0}, "trd_tau is 0, expected"),
        ({"rank": "abc"}, "rank is 'abc', expected int"),
        ({"steps": 2.5}, r"steps is 2\.5, expected int"),
        ({"act_lr": float("nan")}, "act_lr is nan, expected float"),
        ({"omq_acts": 1}, "omq_acts is 1, expected bool"),
        ({"plus": 0.1, "weight_bits": 8}, "no row can be raised"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_expected(settings, text):
    with pytest.raises(ConfigError, match=text):
        MPQDMConfig(**settings)


def test_presets_are_published_settings():
    config = method_config("mpq-dm", preset="lsun-bedrooms-ldm4", seed=5)

    assert (config.steps, config.eta, config.trajectories, config.seed) == (100, 1.0, 320, 5)
    assert config.steps * config.trajectories == 32_000
    assert method_config("rtn-mse", preset="imagenet-ldm4").trajectories == 0
    with pytest.raises(ConfigError, match="preset is 'sd', expected imagenet-ldm4, lsun"):
        method_config("mpq-dm", preset="sd")


def test_unknown_methods_and_settings_are_named():
    with pytest.raises(ConfigError, match="method is 'gptq', expected rtn-minmax"):
        method_config("gptq")
    with pytest.raises(ConfigError, match="no setting 'bits', expected one of act_bits"):
        method_config("rtn-mse", bits=2)
