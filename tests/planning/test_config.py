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
from engine.planning.memory import Job

MADE = [
    config.PRESETS["tiny"],
    config.TrainConfig(),
    config.MeshConfig(),
    config.PipelineConfig(),
]
WRONG = {
    int: [math.nan, math.inf, 1.5, "3", True, None, 2**63, 10**400],
    float: [math.nan, math.inf, -math.inf, "3", True, -1.0, 1e300, 10**400],
    str: [3, b"recall", "no such word"],
    bool: [1, "yes", None],
    config.SamplingConfig: [4, "lcm", {"solver": "lcm"}],
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


JOBS = [
    ("num_frames", [0, math.nan, 1e9, 10**30, True]),
    ("height", [-16, 8193, "480", 10**400]),
    ("width", [math.inf, 1.5, None]),
    ("batch", [0, math.nan, 10**30, True]),
    ("steps", [0, math.inf, 10**30]),
    ("text_rows", [-1, math.nan, 65_537]),
    ("context_rows", [-1, 10**30]),
    ("guided", [1, "yes", math.nan]),
    ("video_cache", [0, True, 1.5, "x", None, 10**30]),
    ("mode", ["x", 1, None]),
    ("dtype", ["int8", math.nan, None]),
    ("precision", ["int4", True]),
    ("offload", ["vae", 1]),
]


@pytest.mark.parametrize("name, value", [(name, x) for name, values in JOBS for x in values])
def test_a_job_that_no_run_can_have_is_refused_by_name(name, value):
    with pytest.raises(UsageError, match=f"^memory: {name} must be .*; got "):
        Job(**{name: value})


def test_a_job_has_a_dtype_of_torch_or_its_name_and_a_cache_by_word_or_number():
    assert Job(dtype="torch.float32").itemsize == Job(dtype="float32").itemsize == 4
    assert (Job(video_cache=np.int64(3)).video_cache, Job(video_cache="frozen").video_cache) == (
        3,
        "frozen",
    )
