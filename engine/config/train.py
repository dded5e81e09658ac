"""How a model is trained, and by which ranks."""

import math
from dataclasses import dataclass
from typing import ClassVar

from engine.config.fields import COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE, Range, check_fields
from engine.errors import UsageError


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training.

    stage: "recall" (text target = prompt, condition heavily dropped), "refine" (text target =
        detailed caption) or "distill" (few steps without guidance learn a teacher's many, see
        `engine.train.distill`).
    condition_dropout: share of samples whose prompt condition is replaced by a null, half of them
        by the encoded empty string (guidance's null) and half by zeros (captioning's null).
        None: 0.8 in recall, 0.3 in refine.
    t2v_share, v2t_share: shares of samples trained at the corners that inference visits and
        independent times meet with probability zero. t2v: the text rows hold the clean prompt at
        text time 0 and give no text loss. v2t: the video is clean at video time 0 and gives no
        video loss, and the condition is zeros.
    steps: optimizer steps of the whole run.
    lr: of AdamW.
    muon_lr: of Muon on the blocks' matrices; 0 leaves them to AdamW.
    warmup: steps in which the learning rates rise to their full values.
    weight_decay: of AdamW and Muon.
    grad_clip: the largest norm of all gradients together.
    ema: decay of the parameters' average, which is what is saved; 0: none is kept.
    batch_size: samples of a step, of all ranks together.
    micro_batch_size: samples that a rank computes at a time; 0: all of its own.
    lambda_text: weight of the text loss against the video loss.
    text_loss: "ce" (cross-entropy) or "kl".
    flow_shift: more puts more samples, or in distill more steps, at high noise.
    text_exponent: n of the text's kappa(t) = t ** n.
    seed: of every random number of the run.
    recompute: none, attention or block; see `engine.recompute`.
    precision: bf16 (the model's dtype) or fp8: experts run forward in e4m3, see `engine.fp8`.
    freeze: names of parameters that stay as they are, separated by commas, * for anything.
    lora_rank: of two factors added to each matrix of the blocks, which are then all that is
        trained; 0: full training.
    student_steps: of distill, the numbers of steps that the student learns, which training takes in
        turn.
    teacher_steps: of distill, the steps of the teacher, a multiple of each of the student's.
    guidance_scale: of distill, the teacher's.
    matching: of distill, the weight of distribution matching, which begins when `warmup` is over;
        see `engine.train.matching`. 0: there is none, and no second network is trained.
    """

    RANGES: ClassVar = {
        **dict.fromkeys(("steps", "batch_size"), COUNT),
        **dict.fromkeys(("student_steps", "teacher_steps"), COUNT),
        **dict.fromkeys(("lr", "grad_clip", "flow_shift", "text_exponent"), POSITIVE),
        **dict.fromkeys(("muon_lr", "weight_decay", "lambda_text", "guidance_scale"), NOT_NEGATIVE),
        "matching": NOT_NEGATIVE,
        **dict.fromkeys(("micro_batch_size", "lora_rank", "warmup"), NOT_NEGATIVE),
        **dict.fromkeys(("ema", "t2v_share", "v2t_share", "condition_dropout"), SHARE),
        "seed": SEED,
    }
    CHOICES: ClassVar = {
        "stage": ("recall", "refine", "distill"),
        "text_loss": ("ce", "kl"),
        "recompute": ("none", "attention", "block"),
        "precision": ("bf16", "fp8"),
    }

    stage: str = "recall"
    steps: int = 1000
    batch_size: int = 64
    lr: float = 1e-3
    muon_lr: float = 0.0
    warmup: int = 100
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema: float = 0.999
    condition_dropout: float | None = None
    t2v_share: float = 0.2
    v2t_share: float = 0.2
    lambda_text: float = 1.0
    text_loss: str = "ce"
    flow_shift: float = 3.0
    text_exponent: float = 1.0
    seed: int = 0
    micro_batch_size: int = 0
    recompute: str = "none"
    precision: str = "bf16"
    freeze: str = ""
    lora_rank: int = 0
    student_steps: tuple[int, ...] = ()
    teacher_steps: int = 24
    guidance_scale: float = 3.0
    matching: float = 0.0

    def __post_init__(self):
        check_fields(self, "train")
        if self.freeze and self.lora_rank:
            raise UsageError(
                "train: freeze must be left out with lora_rank, which freezes the whole model; "
                f"got {self.freeze!r}."
            )
        if self.t2v_share + self.v2t_share > 1:
            got = f"{self.t2v_share} + {self.v2t_share}"
            raise UsageError(f"train: t2v_share + v2t_share must be at most 1; got {got}.")

    @property
    def dropout(self) -> float:
        if self.condition_dropout is not None:
            return self.condition_dropout
        return 0.8 if self.stage == "recall" else 0.3


@dataclass(frozen=True)
class MeshConfig:
    """How processes are arranged; at most one dimension is -1, for all that the others leave.

    dp_replicate: copies of the parameters.
    dp_shard: ranks that share parameters and have data of their own.
    sp: ranks that share each sample.
    cfg: 2 where sampling has a rank for the prompt and one for its null.
    """

    AXES: ClassVar[tuple[str, ...]] = ("dp_replicate", "dp_shard", "sp", "cfg")
    RANGES: ClassVar = dict.fromkeys(AXES, Range(-1))
    CHOICES: ClassVar = {}

    dp_replicate: int = 1
    dp_shard: int = -1
    sp: int = 1
    cfg: int = 1

    def __post_init__(self):
        check_fields(self, "parallel")

    def shape(self, processes: int) -> tuple[int, int, int, int]:
        """Errors: UsageError where the dimensions do not make up the processes."""
        sizes = [getattr(self, name) for name in self.AXES]
        fixed = math.prod(n for n in sizes if n != -1)
        valid = all(n >= 1 or n == -1 for n in sizes) and sizes.count(-1) <= 1
        valid = valid and self.cfg in (1, 2)
        if valid and processes % fixed == 0:
            sizes = [processes // fixed if n == -1 else n for n in sizes]
        if not valid or math.prod(sizes) != processes:
            got = ", ".join(f"{k} {v}" for k, v in zip(self.AXES, sizes, strict=True))
            raise UsageError(
                f"parallel: {' * '.join(self.AXES)} must be the {processes} processes, with cfg 1 "
                f"or 2 and at most one -1; got {got}. Change torchrun's --nproc-per-node or these."
            )
        return tuple(sizes)
