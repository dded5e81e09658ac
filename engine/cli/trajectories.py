"""The command that runs a teacher ahead of its student, trajectories. See `engine.cli.commands`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from engine.cli import checks
from engine.cli.flags import own
from engine.config import TrainConfig

USUAL = TrainConfig()


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """Run a teacher ahead, for trainings of --stage distill with the same settings."""

    teacher: Path
    """The model whose steps become few."""
    data: Annotated[tuple[Path, ...], own("PATH [PATH ...]", "none")]
    """Latent shards, in the order of the training."""
    output_path: Path
    """Folder of the trajectories. Of an unfinished one what is missing is written."""
    student_steps: tuple[int, ...]
    """The numbers of steps that the student learns, in turn."""
    steps: int = USUAL.steps
    """Training steps that they are for; a training may have fewer."""
    batch_size: int = USUAL.batch_size
    """Samples of a step, of all ranks together."""
    micro_batch_size: int = USUAL.micro_batch_size
    """Samples that the teacher runs at a time; 0: all. As the training's, if every bit is to be as
    with --teacher."""
    teacher_steps: int = USUAL.teacher_steps
    """Steps of the teacher, a multiple of each of the student's."""
    guidance_scale: float = USUAL.guidance_scale
    """The teacher's guidance."""
    flow_shift: float = USUAL.flow_shift
    """More puts more steps at high noise."""
    t2v_share: float = USUAL.t2v_share
    """Share of samples that are text to video alone."""
    v2t_share: float = USUAL.v2t_share
    """Share of samples that are captions of the data's clips."""
    seed: int = USUAL.seed
    """The training's."""
    verify: bool = False
    """Compare all bytes of --data and --teacher with their SHA-256 first."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of matmuls and attention; the training's, for the same teacher."""
    kernels: str = "auto"
    """auto, a backend, or op=backend,... as `univigu env` lists them."""
    quiet: bool = False
    """No progress bar."""

    @property
    def settings(self) -> TrainConfig:
        names = """steps batch_size micro_batch_size student_steps teacher_steps guidance_scale
        flow_shift t2v_share v2t_share seed""".split()
        return TrainConfig(stage="distill", **{name: getattr(self, name) for name in names})

    def run(self) -> None:
        settings = self.settings
        checks.check_folder(self.output_path)
        checks.check_seed(self.seed)
        device = checks.find_device(self.device)
        import torch
        from tqdm import tqdm

        from engine.data import LatentSet
        from engine.files.hashes import check_hashes
        from engine.train import distill
        from engine.weights import load_model
        from engine.weights.files import find_model
        from engine.weights.load import sources

        data, dtype = LatentSet(*self.data), getattr(torch, self.dtype)
        checks.check_kernels(self.kernels, device, dtype)
        if self.verify:
            check_hashes(sources(find_model(self.teacher)))
            data.verify()
        teacher = load_model(self.teacher, device, dtype, self.kernels, precision="bf16")
        checks.check_shard(data, teacher.cfg, settings)

        def progress(steps):
            return tqdm(steps, desc="training steps", disable=self.quiet)

        distill.write_ahead(teacher, data, settings, self.output_path, progress)
        print(self.output_path)
