"""The options of the sampler: declared once, with the defaults of its settings."""

from __future__ import annotations

from dataclasses import fields
from typing import get_type_hints

import pytest
from trl import TrlParser

from trl_diffusion.sampling import SamplingArguments, SamplingConfig
from trl_diffusion.sampling.arguments import OPTIONS, GreedyArguments
from trl_diffusion.sampling.unmasking import RULES
from trl_diffusion.trainers import AGRPOConfig, DiffusionGRPOConfig

NO_OPTIONS = {"canvas_length", "record_signals", "record_support", "rollout_compile", "shift_window"}


def test_every_setting_is_an_option_of_the_same_type_and_default():
    settings, options = get_type_hints(SamplingConfig), get_type_hints(SamplingArguments)
    assert settings.keys() == options.keys() | NO_OPTIONS and not options.keys() & NO_OPTIONS
    assert all(settings[name] == kind for name, kind in options.items())
    assert SamplingArguments().sampling_on(256) == SamplingConfig()
    assert all(option.metadata["help"] for option in fields(SamplingArguments))
    assert all(rule in SamplingArguments.__dataclass_fields__["unmasking"].metadata["help"] for rule in RULES)


@pytest.mark.parametrize("config", [DiffusionGRPOConfig, GreedyArguments])
def test_who_inherits_has_every_option(config):
    assert set(OPTIONS) <= {option.name for option in fields(config)}
    help_texts = {option.name: option.metadata["help"] for option in fields(config) if option.name in OPTIONS}
    assert help_texts == {option.name: option.metadata["help"] for option in fields(SamplingArguments)}


def test_options_are_read_from_the_command_line():
    arguments = ["--cache", "dual", "--cache_refresh", "2", "--confidence_threshold", "0.9", "--top_k", "4"]
    (parsed,) = TrlParser((GreedyArguments,)).parse_args_and_config(arguments)
    config = parsed.sampling_on(32, denoising_steps=8, block_length=16, record_support=False)
    assert config == SamplingConfig(
        32, 8, 16, 0.0, 4, 1.0, "max_prob", False, False, confidence_threshold=0.9, cache="dual", cache_refresh=2
    )


def test_a_config_is_checked_once_and_follows_its_fields(monkeypatch, tmp_path):
    checked, check = [], SamplingConfig.__post_init__
    monkeypatch.setattr(SamplingConfig, "__post_init__", lambda self: checked.append(self) or check(self))
    args = AGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, temperature=0.654321)
    before = args.sampling_config()
    assert all(args.sampling_config() is before for _ in range(3)) and len(checked) == 1
    args.temperature = 0.7654321
    assert args.sampling_config().temperature == 0.7654321 and before.temperature == 0.654321
    args.block_length = 7
    for _ in range(2):  # what is refused is refused every time
        with pytest.raises(ValueError, match="must divide the canvas length"):
            args.sampling_config()
