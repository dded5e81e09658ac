"""Every field of every configuration: wrong types, and numbers that are not finite or not in its
range, are refused by name wherever the configuration is made."""

import json
import math
from dataclasses import MISSING, fields, replace
from typing import get_args

import numpy as np
import pytest

from engine import config
from engine.errors import ModelFileError, UsageError

MADE = [
    config.PRESETS["tiny"],
    config.TrainConfig(),
    config.MeshConfig(),
    config.PipelineConfig(),
]
WRONG = {
    int: [math.nan, math.inf, 1.5, "3", True, None],
    float: [math.nan, math.inf, -math.inf, "3", True, -1.0],
    str: [3, b"recall", "no such word"],
    bool: [1, "yes", None],
}
FREE_TEXT = {"freeze"}


def kind_of(field):
    return (get_args(field.type) or (field.type,))[0]


CASES = [
    (made, field.name, value)
    for made in MADE
    for field in fields(made)
    for value in WRONG[kind_of(field)]
    if not (field.name in FREE_TEXT and isinstance(value, str))
] + [(config.TrainConfig(), "seed", value) for value in (2**63, -(2**63) - 1)]


@pytest.mark.parametrize("made, name, value", CASES, ids=str)
def test_what_a_field_cannot_hold_is_refused_by_its_name(made, name, value):
    with pytest.raises(UsageError, match=rf"\b{name} must be .*; got "):
        replace(made, **{name: value})


@pytest.mark.parametrize("made", MADE, ids=lambda made: type(made).__name__)
def test_every_number_has_a_range_and_every_default_is_in_it(made):
    numbers = {f.name for f in fields(made) if kind_of(f) in (int, float)}
    assert numbers == set(type(made).RANGES)
    words = {f.name for f in fields(made) if kind_of(f) is str} - FREE_TEXT
    assert words == set(type(made).CHOICES)
    given = {f.name: getattr(made, f.name) for f in fields(made) if f.default is MISSING}
    assert type(made)(**given) == replace(made)


def test_numpys_numbers_become_pythons():
    made = config.TrainConfig(steps=np.int64(7), lr=np.float32(0.5), warmup=np.uint8(3))
    assert json.loads(json.dumps([made.steps, made.lr, made.warmup])) == [7, 0.5, 3]
    assert config.TrainConfig(lr=1) == config.TrainConfig(lr=1.0)


@pytest.mark.parametrize(
    "record",
    ['{"fps": NaN}', '{"fps": 0}', '{"height": "480"}', '{"text_rows": 1.5}', '{"fps": [8]}'],
)
def test_a_folders_own_configuration_is_checked_too(tmp_path, record):
    (tmp_path / "pipeline.json").write_text(record)
    with pytest.raises(ModelFileError, match=r"pipeline\.json must be .* must be "):
        config.read_pipeline_config(tmp_path)
