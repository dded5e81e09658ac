"""Frozen configurations and presets. No tensor library is imported here: `--help` must be
instant."""

from engine.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".fields": (
            "CLIPS",
            "COUNT",
            "GUIDANCE",
            "LAYERS",
            "NOT_NEGATIVE",
            "Range",
            "SEED",
            "SHIFT",
            "SIZE",
            "STEPS",
            "check_fields",
            "checked",
            "read_fields",
        ),
        ".model": (
            "ModelConfig",
            "PRESETS",
        ),
        ".pipeline": (
            "EMBEDDED",
            "FEW_STEPS",
            "FRAME_STRIDE",
            "GRIDS",
            "HIGHEST",
            "MAX_SIDE",
            "MOST_FRAMES",
            "MOST_ROWS",
            "PIXEL_STRIDE",
            "PipelineConfig",
            "SOLVERS",
            "SamplingConfig",
            "check_grid",
            "check_size",
            "find_few_steps",
            "one_grid",
            "read_file",
            "read_pipeline_config",
        ),
        ".train": (
            "MeshConfig",
            "TrainConfig",
        ),
        ".vae": (
            "CHANNELS",
            "CHUNK",
            "SIDE",
            "VAEConfig",
        ),
    },
)
