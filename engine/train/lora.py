"""What of a model is trained: freezing by name, and low-rank adapters (LoRA, Hu et al. 2021), which
are saved as diffusers saves them and started from such a file."""

import hashlib
import json
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize

from engine.errors import UsageError
from engine.files.hashes import save_manifest
from engine.files.manifest import NAME as MANIFEST
from engine.files.manifest import Digest, Manifest, hash_groups
from engine.files.tensors import entries_of, file_chunks
from engine.files.writing import replacing, write_hashed
from engine.weights.adapters import METADATA, SAMPLING, Adapter
from engine.weights.names import stock_names

FILE = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder
OURS = "univigu"  # metadata that says what an adapter was trained on


def freeze(model: nn.Module, patterns: str) -> None:
    """Stops the gradients of the parameters whose names match one of the patterns, which are
    separated by commas. Errors: UsageError for a pattern that matches none, or if all match."""
    names = dict(model.named_parameters())
    for pattern in filter(None, patterns.split(",")):
        matched = [p for name, p in names.items() if fnmatchcase(name, pattern)]
        if not matched:
            raise UsageError(
                f"train: freeze must name parameters; got {pattern!r}, which none matches. "
                f"They are called {next(iter(names))}, and so on; * stands for anything."
            )
        for p in matched:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in names.values()):
        raise UsageError(f"train: freeze must leave a parameter; got {patterns!r}.")


class LowRank(nn.Module):
    """weight + up @ down, up zero at first. Kernels get the sum: a matrix more in memory while its
    layer runs, and no GEMM of the rows."""

    def __init__(self, weight_NM: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        (N, M), like = weight_NM.shape, {"dtype": weight_NM.dtype, "device": weight_NM.device}
        down_RM = torch.randn(rank, M, generator=generator) * M**-0.5
        self.down = nn.Parameter(down_RM.to(**like))
        self.up = nn.Parameter(torch.zeros(N, rank, **like))

    def forward(self, weight_NM: Tensor) -> Tensor:
        return torch.addmm(weight_NM, self.up, self.down)


def _matrices(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]


def add_lora(model: nn.Module, rank: int, seed: int) -> None:
    """Freezes the model and adapts each matrix of its blocks."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for module in _matrices(model):
        adapter = LowRank(module.weight, rank, generator)
        parametrize.register_parametrization(module, "weight", adapter)


def merge_lora(model: nn.Module) -> None:
    """Puts the sums in the place of the weights; a model without adapters stays as it is."""
    for module in _matrices(model):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")


def save_adapter(
    factors: dict[str, Tensor], base: str, path: Path, sampling: dict | None = None
) -> None:
    """Writes path/pytorch_lora_weights.safetensors: keys of PEFT under diffusers' names of modules,
    so that diffusers loads what its transformer has, and its alpha is its rank. A stack's parts
    share its `down`.

    factors: `LowRank`'s up [N, R] and down [R, M] by the names of their parameters.
    base: the fingerprint of what they were trained on.
    sampling: how a model with them is to be sampled, where they ask for that.
    """
    tensors = {}
    for name, up in factors.items():
        module, _, end = name.partition(".parametrizations.weight.0.")
        if end != "up":
            continue
        down, parts = factors[name.removesuffix("up") + "down"], stock_names(f"{module}.weight")
        for part, rows in zip(parts, up.chunk(len(parts)), strict=True):
            key = f"transformer.{part.removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"] = down.clone()
            tensors[f"{key}.lora_B.weight"] = rows.clone()

    rank = len(down)
    targets = sorted({key.split(".", 3)[3].rpartition(".lora_")[0] for key in tensors})
    config = {"r": rank, "lora_alpha": rank, "target_modules": targets}
    config = {f"transformer.{name}": value for name, value in config.items()}
    said = {
        "format": "pt",
        METADATA: json.dumps(config),
        OURS: json.dumps({"base": base, "rank": rank}),
    }
    said |= {} if sampling is None else {SAMPLING: json.dumps(sampling)}
    path.mkdir(parents=True, exist_ok=True)
    (path / MANIFEST).unlink(missing_ok=True)  # what it says is about to change
    digests: dict[str, Digest] = {}
    chunks = file_chunks(entries_of({k: t.cpu() for k, t in tensors.items()}), said, digests)
    with replacing(path / FILE) as partial:
        file = write_hashed(partial, chunks)
    save_manifest(Manifest({FILE: file}, hash_groups(digests.items())), path)


@torch.no_grad()
def start_from(model: nn.Module, adapter: Adapter) -> None:
    """Gives the model's adapters the numbers of a file that `save_adapter` wrote.

    Errors: UsageError for one of another base, rank or set of matrices.
    """
    said = json.loads(adapter.said.get(OURS, "{}"))
    if said.get("base") != fingerprint(model):
        got = "another" if said else "a file that says of none"
        raise UsageError(
            f"train: --init-lora must be an adapter that --lora-rank trained on this base, in this "
            f"--dtype; got {got}: {adapter.path}. Start from its base, or merge it with "
            "univigu convert --lora and train a new one."
        )

    for name, module in model.blocks.named_modules(prefix="blocks"):
        if not parametrize.is_parametrized(module, "weight"):
            continue
        parts = [adapter.deltas.get(part) for part in stock_names(f"{name}.weight")]
        own = module.parametrizations.weight[0]
        if None in parts or parts[0].down.shape != own.down.shape:
            found = "none" if None in parts else len(parts[0].down)
            raise UsageError(
                f"train: --lora-rank must be that of {adapter.path}; got {len(own.down)} "
                f"instead of {found} at {name}. Give --lora-rank {said['rank']}."
            )
        own.down.copy_(parts[0].down)
        own.up.copy_(torch.cat([part.factor * part.up for part in parts]))


def fingerprint(model: nn.Module) -> str:
    """A digest of the frozen parameters, which no checkpoint holds; the same on every device."""
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    if not frozen or frozen[0][1].is_meta or isinstance(frozen[0][1], FakeTensor):
        return ""
    digest, bits = hashlib.sha256(), {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, p in frozen:
        digest.update(f"{name} {p.view(bits[p.element_size()]).sum(dtype=torch.int64)}".encode())
    return digest.hexdigest()
