"""What a diffusers folder says beside its tensors: model_index.json names its pipeline, and
scheduler/scheduler_config.json how it is to be sampled."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import SHIFT, PipelineConfig, checked, read_pipeline_config
from engine.errors import ModelFileError, UsageError
from engine.files.reading import read_json
from engine.schedule import FLOW_SHIFT, SOLVER
from engine.weights.files import find_model
from engine.weights.forms import say
from engine.weights.variants import TWO_EXPERTS

_PIPELINES = ("WanPipeline", "WanVideoToVideoPipeline")  # both run a text-to-video transformer
_OTHER_PIPELINES = {
    "ImageToVideo": "an image-to-video pipeline",
    "VACE": "a VACE pipeline",
    "Animate": "an Animate pipeline",
    "S2V": "an audio-driven pipeline",
    "Fun": "a Fun pipeline",
}
_SOLVERS = {
    "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchLCMScheduler": "lcm",
}
_SAMPLED_AS = {  # what the solvers do; a configuration that says otherwise is not followed
    "num_train_timesteps": 1000,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "stochastic_sampling": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "lower_order_final": True,
    "disable_corrector": [],
    "solver_p": None,
    "thresholding": False,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "scale_factors": None,
}


@dataclass(frozen=True)
class Index:
    """How a folder is sampled where the caller does not say, and what of it is not followed.

    flow_shift: between 0.001 and 1000; 3 where the folder has none.
    solver: "unipc", "euler" or "lcm".
    ignored: a line of text, or "".
    """

    flow_shift: float = FLOW_SHIFT
    solver: str = SOLVER
    ignored: str = ""


def read_index(path: Path, other_transformer: bool = False) -> Index:
    """What the folder of a pipeline says; of anything else, the defaults. Nothing is printed.

    path: the pipeline folder, or the transformer/ in it, or a file of that.
    other_transformer: the folder's own is not used, so that its kind does not matter.

    Errors: ModelFileError for two experts, a pipeline of another kind, another prediction type, a
    flow_shift out of its range, and damaged JSON.
    """
    folder = path if path.is_dir() else path.parent
    inside = folder.name in ("transformer", "transformer_2")
    if not path.is_dir() and not inside:  # a lone file, which a folder around it says nothing of
        return Index()
    folder = folder.parent if inside else folder
    ignored = [] if other_transformer else _check_pipeline(folder)
    file = folder / "scheduler" / "scheduler_config.json"
    if not os.path.lexists(file):
        return Index(ignored=" ".join(ignored))

    config = read_json(file)
    _check_prediction(config, file)
    name = _class_name(config, file, "UniPCMultistepScheduler")
    if name not in _SOLVERS:
        ignored.append(f"{file}: {name} is not here; {SOLVER} is used.")
    changed = [
        f"{key} {config[key]!r}"
        for key, ours in _SAMPLED_AS.items()
        if key in config and config[key] != ours
    ]
    if changed:
        ignored.append(f"{file}: {', '.join(changed)}: not followed.")
    return Index(_shift(config, file), _SOLVERS.get(name, SOLVER), " ".join(ignored))


def take_index(path: Path, other_transformer: bool = False) -> Index:
    """Reads what the folder says, as `read_index`; what is not followed goes to stderr once."""
    index = read_index(path, other_transformer)
    if index.ignored:
        say(index.ignored)
    return index


def sampled_as(config: PipelineConfig, transformer: str | Path | None) -> PipelineConfig:
    """A folder's configuration. For another transformer than its own, with what the pipeline.json
    of that one says of sampling, if there is any."""
    if transformer is None:
        return config
    path = find_model(transformer)
    folder = path if path.is_dir() else path.parent
    folder = folder.parent if folder.name == "transformer" else folder
    return replace(config, sampling=read_pipeline_config(folder).sampling)


def _check_pipeline(folder: Path) -> list[str]:
    """What is ignored of model_index.json. Errors: ModelFileError."""
    file = folder / "model_index.json"
    index = read_json(file) if os.path.lexists(file) else {}
    experts = index.get("transformer_2")
    signs = [
        "transformer_2" if (any(experts) if isinstance(experts, list) else experts) else "",
        "transformer_2/" if (folder / "transformer_2").is_dir() else "",
        "high_noise_model/" if (folder / "high_noise_model").is_dir() else "",
        "boundary_ratio" if index.get("boundary_ratio") is not None else "",
    ]
    if any(signs):
        raise ModelFileError(TWO_EXPERTS.format(folder, ", ".join(filter(None, signs))))

    name = _class_name(index, file, _PIPELINES[0])
    what = next((what for mark, what in _OTHER_PIPELINES.items() if mark in name), None)
    if index.get("expand_timesteps"):
        what = "a Wan2.2 TI2V pipeline (expand_timesteps)"
    if what is not None:
        raise ModelFileError(
            f"{file}: must be of a text-to-video pipeline; got {what}: {name}. "
            "Use a T2V folder, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    return [] if name in _PIPELINES else [f"{file}: {name} is read as {_PIPELINES[0]}."]


def _check_prediction(config: dict[str, Any], file: Path) -> None:
    kind = config.get("prediction_type", "flow_prediction")
    if kind != "flow_prediction":
        raise ModelFileError(
            f"{file}: prediction_type must be flow_prediction; got {kind!r}. "
            "Use a folder of a flow-matching Wan2.1 model."
        )


def _shift(config: dict[str, Any], file: Path) -> float:
    key = "flow_shift" if "flow_shift" in config else "shift"
    value = config.get(key)
    if value is None:
        return FLOW_SHIFT
    try:
        return checked(key, value, float, SHIFT, None)
    except UsageError as error:
        raise ModelFileError(f"{file}: {error} Correct it: 3 for 480p, 5 for 720p.") from None


def _class_name(config: dict[str, Any], file: Path, otherwise: str) -> str:
    name = config.get("_class_name", otherwise)
    if not isinstance(name, str):
        raise ModelFileError(
            f"{file}: _class_name must be a text; got {name!r:.80}. Download it again."
        )
    return name
