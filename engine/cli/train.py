"""The command that makes models, train. See `engine.cli.commands`."""

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes

from engine.cli import checks
from engine.cli.flags import own
from engine.config import (
    PRESETS,
    MeshConfig,
    ModelConfig,
    TrainConfig,
)
from engine.errors import UsageError
from engine.parallel import restarts


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model on latent shards, or a VAE or text encoder on the synthetic set."""

    output_path: Path
    """Folder of the run: checkpoint, metrics.jsonl, and the averaged model at the end."""
    part: Literal["model", "vae", "text-encoder"] = "model"
    """vae and text-encoder are fixed recipes: of the other flags they take --seed alone."""
    data: Annotated[tuple[Path, ...], own("PATH [PATH ...]", "none")] = ()
    """Latent shards from `univigu preprocess`; a batch is of clips of one size."""
    model_path: Annotated[Path | None, own("PATH", "none")] = None
    """Refuse shards unless they were made with this folder's VAE, text encoder and tokenizer."""
    preset: Annotated[str | None, own("{" + ",".join(PRESETS) + "}", "none")] = None
    """Start from random weights of this size."""
    init_from: Annotated[Path | None, own("PATH", "none")] = None
    """Start from this model: stage refine starts from the model that recall saved."""
    init_lora: Annotated[Path | None, own("PATH", "none")] = None
    """Start from this adapter, which --lora-rank saved when it trained on the same model."""
    verify: bool = False
    """Compare all bytes of --data, --init-from and --init-lora with their SHA-256 first; --resume
    compares those of --data in any case."""
    teacher: Annotated[Path | None, own("PATH", "none")] = None
    """Of --stage distill: the model whose steps become few; --init-from may name the same."""
    trajectories: Annotated[Path | None, own("PATH", "none")] = None
    """In place of --teacher: what one did, from `univigu trajectories`."""
    blind_video: bool = False
    """Hide the text from video rows: captions from a frozen video are then exact."""
    resume: bool = False
    """Continue from the run's checkpoint. --steps may be more than before."""
    resume_with: tuple[Literal["lr", "data"], ...] = ()
    """What may be another than before at --resume: lr (and --muon-lr), data."""
    save_every: int = 500
    """Steps between checkpoints."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the model that is saved at the end."""
    device: str = "auto"
    """auto, cpu or cuda. Under torchrun every process has a device of its own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of matmuls and attention; master weights, moments and averages are float32."""
    dp_replicate: int = 1
    """Under torchrun: copies of the parameters (HSDP)."""
    dp_shard: int = -1
    """Under torchrun: ranks that share parameters and have samples of their own; -1: the rest."""
    sp: int = 1
    """Under torchrun: ranks that share each sample's rows (sequence parallel)."""
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Loggers that get the metrics too, beside metrics.jsonl."""
    dry_run: bool = False
    """Predict memory and FLOPs of each rank, by --recompute, and train nothing."""
    processes: int = 1
    """Processes that --dry-run predicts for."""
    kernels: str = "auto"
    """auto, a backend, or op=backend,... as `univigu env` lists them."""
    quiet: bool = False
    """No progress bar."""
    settings: OmitArgPrefixes[TrainConfig] = TrainConfig()

    def run(self) -> None:
        if self.dry_run:
            self.predict()
            return
        checks.check_folder(self.output_path)
        checks.check_seed(self.settings.seed)
        if self.part == "model":
            self.train_model()
            return
        plain = TrainConfig(seed=self.settings.seed)
        if self != Train(part=self.part, output_path=self.output_path, settings=plain):
            raise UsageError(
                f"train: flags with --part {self.part} must be --output-path and --seed alone; "
                "got others. Leave them out."
            )
        from engine.toy import recipe

        if self.part == "vae":
            recipe.train_vae(self.output_path, seed=self.settings.seed)
        else:
            recipe.train_text_encoder(self.output_path, seed=self.settings.seed)
        print(self.output_path)

    @property
    def mesh(self) -> MeshConfig:
        return MeshConfig(self.dp_replicate, self.dp_shard, self.sp)

    def check_model(self) -> None:
        if (self.preset is None) == (self.init_from is None):
            got = "neither" if self.preset is None else "both"
            raise UsageError(f"train: one of --preset and --init-from must be given; got {got}.")
        if self.preset is not None:
            ModelConfig.preset(self.preset)
        checks.check_teacher(self.settings.stage, self.teacher, self.trajectories)
        if self.init_lora is not None and not self.settings.lora_rank:
            raise UsageError(
                f"train: --init-lora must go with --lora-rank; got {self.init_lora} alone. "
                "Give the rank that it was trained with."
            )

    def predict(self) -> None:
        """Prints the dry run for clips of 81 frames of 480 x 832, or for the largest in --data."""
        self.check_model()
        if self.trajectories is not None:
            raise UsageError(
                "train: --trajectories must be left out with --dry-run, which counts the teacher's "
                f"work; got {self.trajectories}. Give --teacher."
            )
        checks.check_count("--processes", self.processes)
        import torch

        from engine.data import LatentSet
        from engine.train import dry_run
        from engine.weights import open_model

        cfg = ModelConfig.preset(self.preset) if self.preset else open_model(self.init_from)[0]
        size = ((16, 21, 60, 104), (256,), (512, cfg.text_dim))
        if self.data:
            size = LatentSet(*self.data).largest
        dtype = getattr(torch, self.dtype)
        teacher = None if self.teacher is None else open_model(self.teacher)[0]
        layout = self.mesh, self.processes
        print(dry_run.report(cfg, self.settings, dtype, size, *layout, teacher))

    def check(self) -> None:
        checks.check_count("--save-every", self.save_every)
        if not self.data:
            raise UsageError(
                "train: --data must name a latent shard; got none. Run univigu preprocess."
            )
        if self.resume_with and not self.resume:
            raise UsageError(
                f"train: --resume-with must go with --resume; got {', '.join(self.resume_with)} "
                "alone. Add --resume."
            )
        self.check_model()
        held = any((self.output_path / "checkpoint").glob("step-*[0-9]"))
        if held and not self.resume and not restarts():
            raise UsageError(
                f"train: --output-path must hold no checkpoint; got one in {self.output_path}. "
                "Add --resume, or choose another folder."
            )

    def train_model(self) -> None:
        self.check()
        device = checks.find_device(self.device)
        import torch.distributed as dist

        from engine.parallel import World

        if not dist.is_torchelastic_launched():
            try:
                self.mesh.shape(1)
            except UsageError as error:
                raise UsageError(f"{error} Start with: torchrun ... -m engine train ...") from None
            self.train_on(device, None)
            return
        world = World.start(self.mesh, device.type)
        with world.named_failures():
            world.check_same("settings", asdict(self.settings))
            self.train_on(world.device, world)
        world.stop()

    def train_on(self, device, world) -> None:
        import torch

        from engine import checkpoint, train
        from engine.data import LatentSet
        from engine.train import distill
        from engine.train.metrics import plot
        from engine.weights import save_pretrained
        from engine.weights.forms import say

        data = LatentSet(*self.data)
        model = self.make_model(device, "cpu" if world is not None else device, data, world)
        ranks = 1 if world is None else world.data_size
        checks.check_shard(data, model.cfg, self.settings, self.model_path, ranks)
        given = {"adapter": self.init_lora, "teacher": self.find_teacher(model, device)}
        state = train.TrainState.create(model, self.settings, world, **given)
        state.origin = self.origin()
        if self.resume or restarts():
            folder = self.output_path / "checkpoint"
            checkpoint.load(state, folder, required=self.resume, changed=self.resume_with)
        if "data" in self.resume_with and state.data not in ("", data.identity):
            say(f"train: from step {state.step} on with {data.identity} instead of {state.data}.")
            state.data = ""
        train.fit(
            state,
            data,
            self.output_path,
            self.save_every,
            progress=not self.quiet,
            log_to=self.log_to,
            verify=self.verify,
        )
        averaged, target = state.ema_model(torch.float32), self.output_path / "model"
        if self.settings.lora_rank:
            state.save_adapter(self.output_path / "adapter")
        if world is not None and world.rank > 0:
            return
        save_pretrained(averaged, target, dtype=getattr(torch, self.save_dtype))
        if self.settings.stage == "distill":
            distill.save_sampling(self.settings, target)
        if find_spec("matplotlib"):
            plot(self.output_path)
        print(target)

    def find_teacher(self, model, device):
        """Stage distill's, or what it did; None in other stages."""
        from engine.train.distill import load_teacher
        from engine.train.trajectories import Trajectories

        if self.trajectories is not None:
            return Trajectories(self.trajectories)
        return self.teacher and load_teacher(self.teacher, model, device)

    def origin(self) -> dict[str, str]:
        """What `engine.train.export` needs to make the untrained part of the model again."""
        if self.preset is not None:
            return {"preset": self.preset, "dtype": self.dtype}
        from engine.weights.files import find_model

        return {"init_from": str(find_model(self.init_from).absolute()), "dtype": self.dtype}

    def make_model(self, device, place, data, world):
        """For `device`, at `place`: under torchrun all ranks make the same in host memory, and each
        takes its share of it to its device. Its kernels are those for the largest clips of data."""
        import torch

        from engine.files.hashes import check_hashes
        from engine.model import UniViGU
        from engine.train.step import case_of
        from engine.weights import load_model, open_model
        from engine.weights.files import find_model
        from engine.weights.load import sources
        from univigu_kernels import bind

        dtype = getattr(torch, self.dtype)
        checks.check_kernels(self.kernels, device, dtype)
        cfg = ModelConfig.preset(self.preset) if self.preset else open_model(self.init_from)[0]
        ranks = () if world is None else (world.data_size, world.config.sp)
        case = case_of(cfg, self.settings, data.largest, *ranks)
        once = None if world is None else world.once
        ops = bind(self.kernels, device, dtype, case=case, training=True, once=once)

        if self.verify:
            paths = [] if self.init_from is None else sources(find_model(self.init_from))
            paths += [] if self.init_lora is None else [self.init_lora]
            check_hashes(paths, world and world.on_each_node)
        torch.manual_seed(self.settings.seed)
        if self.init_from is None:
            model = UniViGU(cfg, place, dtype, ops)
        else:
            model = load_model(self.init_from, place, dtype, ops, precision="bf16")
        if self.blind_video:
            model.hide_text_from_video()
        return model
