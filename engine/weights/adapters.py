"""LoRA files: adapters in every spelling that is published, under the stock names of our tensors.

A key is a prefix, the name of a module and what it holds of the change. The prefix says who wrote
it (PEFT, diffusers, kohya, ComfyUI, DiffSynth, LyCORIS); the module is spelled as in diffusers, in
the Wan2.1 release or in our own files, with dots or with underscores. Of a module there may be

    lora_A, lora_down [R, M]  lora_B, lora_up [N, R]  alpha   a product, times alpha / R
    lora_B.bias [N]                                           the same factor, for the bias
    diff [N, M], diff_b [N], diff_m [1, 6, D]                 a sum for weight, bias, modulation

Every key is applied or named in an error: a file that is half understood is not applied.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from engine.config import SamplingConfig
from engine.errors import ModelFileError, listed
from engine.files.manifest import check_sizes
from engine.files.reading import parse_json, read_bytes, read_json
from engine.files.tensors import Entry, is_finite
from engine.weights.files import DTYPES, FP8_CODE, inventory
from engine.weights.names import from_diffusers, from_original

IN_FOLDERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin")
METADATA = "lora_adapter_metadata"  # in diffusers' files, and in ours
SAMPLING = "sampling"  # in ours: JSON of a SamplingConfig; also the end of a file's name beside it

_FORMS = {
    "base_model.model.": "PEFT",
    "transformer.": "diffusers",
    "model.diffusion_model.": "ComfyUI",
    "diffusion_model.": "ComfyUI",
    "pipe.dit.": "DiffSynth",
    "lora_unet__": "kohya",
    "lora_unet_": "kohya",
    "lycoris_": "LyCORIS",
}
_ROLES = {
    r"\.lora[._](A|down)(\.\w+)?\.weight": "down",
    r"\.lora[._](B|up)(\.\w+)?\.weight": "up",
    r"\.lora_B(\.\w+)?\.bias": "up_bias",
    r"\.alpha": "alpha",
    r"\.diff": "diff",
    r"\.diff_b": "diff_b",
    r"\.diff_m": "diff_m",
}
_FOREIGN = {  # other ways to change a weight than a product and a sum
    r"\.(dora_scale|lora_magnitude_vector(\.\w+)?(\.weight)?)": "DoRA",
    r"\.hada_\w+": "LoHa",
    r"\.lokr_\w+": "LoKr",
    r"\.lora_mid\.weight": "LoCon",
    r"\.(oft_\w+|oft_\w+\.\w+)": "OFT",
}
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # PEFT's others change the base

_ORIGINAL_BLOCK = """self_attn.q self_attn.k self_attn.v self_attn.o self_attn.norm_q
self_attn.norm_k cross_attn.q cross_attn.k cross_attn.v cross_attn.o cross_attn.norm_q
cross_attn.norm_k norm3 ffn.0 ffn.2""".split()
_ORIGINAL_TOP = """patch_embedding text_embedding.0 text_embedding.2 time_embedding.0
time_embedding.2 time_projection.1 head.head""".split()
_DIFFUSERS_TOP = """condition_embedder.time_embedder.linear_1
condition_embedder.time_embedder.linear_2 condition_embedder.time_proj
condition_embedder.text_embedder.linear_1 condition_embedder.text_embedder.linear_2
proj_out""".split()

_NEXT = {
    "without a counterpart in this model": "Use a LoRA of a Wan2.1 text-to-video transformer.",
    "of another shape": "Use a LoRA that was made for a model of this size.",
    "without the other half": "Download it again, or have its author save it whole.",
    "twice": "Keep one adapter in a file.",
    "not of floating point": "Use the LoRA before it was quantised.",
    "not finite": "Use an earlier save of its training.",
}
_MERGE = "Merge it into its base with the tool that made it, and convert the merged model."


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one tensor: factor * up @ down, and diff.

    down [R, ...]: with the inputs of the tensor, up [N, R]; None: there is no product.
    diff: of the tensor's shape, or None.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    factor: float = 1.0
    diff: Tensor | None = None

    def add_to(self, total: Tensor, scale: float) -> None:
        """Adds scale times the change to `total`, in place and in its dtype, on its device."""
        if self.up is not None:
            up, down = (x.to(total).flatten(1) for x in (self.up, self.down))
            rows = total.flatten(1)  # a view: totals are contiguous
            rows.addmm_(up, down, alpha=scale * self.factor)
        if self.diff is not None:
            total.add_(self.diff.to(total).view_as(total), alpha=scale)


class Adapter(NamedTuple):
    """A LoRA file, read into host memory.

    deltas: what it adds, by stock names.
    said: the file's own metadata.
    sampling: how a model with it is sampled, if anything says that.
    """

    path: Path
    deltas: dict[str, Delta]
    said: dict[str, str]
    sampling: SamplingConfig | None = None


def is_adapter(names: Iterable[str]) -> bool:
    """Whether tensors of these names change a model rather than being one."""
    return any(_role(name) or _foreign(name) for name in names)


def read_adapter(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Reads a LoRA.

    path: a .safetensors, .pth, .pt or .bin file, or a folder that PEFT or diffusers saved.
    shapes: of the model's tensors, by stock names.

    Errors: ModelFileError for a file that is absent, damaged, no LoRA, or not applied whole.
    """
    file = _find(Path(path))
    entries, _ = inventory(file)
    if not is_adapter(entries):
        raise ModelFileError(
            f"{path}: a LoRA must hold lora_A and lora_B, lora_down and lora_up, or diff; got "
            f"{len(entries)} tensors: {listed(entries) or 'none'}. Give a whole model as "
            "--transformer-path, or as --model-path of convert."
        )
    said = _metadata(file)
    factors = Factors.read(file, said)
    parts, faults = _assign(entries, _spellings(shapes))
    deltas = {}
    for name, roles in parts.items():
        wrong = list(_mismatches(roles, shapes[name]))
        read = {} if wrong else {role: _numbers(entry) for role, entry in roles.items()}
        wrong += [("not finite", roles[role].key) for role, x in read.items() if not is_finite(x)]
        for fault, key in wrong:
            faults.setdefault(fault, []).append(key)
        if not wrong:
            deltas[name] = _delta(_module(next(iter(roles.values())).key), read, factors)

    if faults:
        got = "; ".join(f"{fault} {len(keys)}: {listed(keys)}" for fault, keys in faults.items())
        raise ModelFileError(
            f"{path}: every key of a LoRA ({form_of(entries)}) must change a tensor of the "
            f"model; got {got}. Nothing was applied. {_NEXT.get(next(iter(faults)), _MERGE)}"
        )
    check_sizes(file)
    return Adapter(Path(path), deltas, said, _sampling(file, said))


def read_sampling(path: str | Path) -> SamplingConfig | None:
    """How an adapter says that a model with it is sampled: in NAME.sampling.json beside the file
    NAME.safetensors, else in the file's metadata. Reads no tensor. Errors: ModelFileError."""
    file = _find(Path(path))
    return _sampling(file, _metadata(file))


def _sampling(file: Path, said: Mapping[str, str]) -> SamplingConfig | None:
    where, beside = f"{file}: metadata {SAMPLING}", file.with_suffix(f".{SAMPLING}.json")
    if not beside.exists() and SAMPLING not in said:
        return None
    if beside.exists():
        where, record = str(beside), read_json(beside)
    else:
        record = parse_json(said[SAMPLING], where)
    try:
        return SamplingConfig(**record)
    except (ValueError, TypeError) as error:
        raise ModelFileError(
            f"{where}: must say how to sample; got {error} Correct it in {beside.name}, which "
            "counts before metadata."
        ) from error


def form_of(names: Iterable[str]) -> str:
    """Who writes names like these: "kohya", "ComfyUI", ...; "bare names" where no prefix tells."""
    found = Counter(form for name in names for p, form in _FORMS.items() if name.startswith(p))
    return found.most_common(1)[0][0] if found else "bare names"


def _module_named(key: str) -> re.Pattern:
    """PEFT's match of a key: the end of a module's name. Errors: ValueError, re.error."""
    if repeats := sorted({*key} & {*"*+?{(|["}):
        raise ValueError(f"alpha_pattern {key!r}: {repeats[0]} could take years to match")
    return re.compile(rf"(.*\.)?({key})")


class Factors(NamedTuple):
    """What a product is multiplied by where the file has no alpha for it.

    alpha: of all modules; None: a module's rank, so that the factor is 1.
    patterns: the alphas of some modules, by expressions that match the ends of their names.
    rslora: divide by the root of the rank.
    """

    alpha: float | None = None
    patterns: dict[re.Pattern, float] = {}
    rslora: bool = False

    @classmethod
    def read(cls, file: Path, said: Mapping[str, str]) -> "Factors":
        """From adapter_config.json beside a file of PEFT, or from a file's metadata."""
        where, text = f"{file}: metadata {METADATA}", said.get(METADATA, "{}")
        config = file.parent / "adapter_config.json"
        if file.name.startswith("adapter_model.") and config.exists():
            where, text = str(config), read_bytes(config)
        try:
            found = {k.removeprefix("transformer."): v for k, v in json.loads(text).items()}
            alpha = found.get("lora_alpha")
            named = (found.get("alpha_pattern") or {}).items()
            patterns = {_module_named(key): float(value) for key, value in named}
            known = None if alpha is None else float(alpha), patterns, bool(found.get("use_rslora"))
        except (ValueError, TypeError, AttributeError, re.error, RecursionError) as error:
            raise ModelFileError(
                f"{where}: must be the JSON of a PEFT LoraConfig; got {error}. Download it again."
            ) from error

        start = found.get("init_lora_weights", True)
        kind = found.get("peft_type") or "LORA"
        if kind != "LORA" or start not in _PLAIN_STARTS:
            raise ModelFileError(
                f"{where}: peft_type must be LORA and init_lora_weights must leave the base as it "
                f"is; got {kind} and {start!r}. {_MERGE}"
            )
        return cls(*known)

    def of(self, module: str, rank: int, alpha: float | None) -> float:
        """alpha: the module's own in the file, which counts first."""
        if alpha is None:
            matching = (a for key, a in self.patterns.items() if key.fullmatch(module))
            alpha = next(matching, rank if self.alpha is None else self.alpha)
        return alpha / (rank**0.5 if self.rslora else rank)


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    found = [path / name for name in IN_FOLDERS if (path / name).is_file()]
    if len(found) != 1:
        got = listed(file.name for file in found) or "none"
        raise ModelFileError(
            f"{path}: a LoRA must be a file, or a folder with one of {', '.join(IN_FOLDERS)}; "
            f"got {got}. Check the spelling, or give the file itself."
        )
    return found[0]


def _metadata(file: Path) -> dict[str, str]:
    if file.suffix not in (".safetensors", ".sft"):
        return {}
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def _role(key: str) -> str | None:
    return next((role for end, role in _ROLES.items() if re.fullmatch(f".*{end}", key)), None)


def _foreign(key: str) -> str | None:
    return next((kind for end, kind in _FOREIGN.items() if re.fullmatch(f".*{end}", key)), None)


def _module(key: str) -> str:
    """The module's name: without prefixes, of which some tools pile up two, and without the end."""
    for end in _ROLES:
        key = re.sub(f"{end}$", "", key)
    while prefix := next((p for p in _FORMS if key.startswith(p)), None):
        key = key.removeprefix(prefix)
    return key


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _spellings(stock: Iterable[str]) -> dict[str, str]:
    """From every spelling of a tensor's name, with underscores for dots, to its stock name."""
    stock = list(stock)
    layers = {m[1] for name in stock if (m := re.match(r"blocks\.(\d+)\.", name))}
    original = [f"blocks.{i}.{module}" for i in layers for module in _ORIGINAL_BLOCK]
    tables = [f"blocks.{i}.modulation" for i in layers] + ["head.modulation"]

    def both(modules: list[str], alone: list[str]) -> dict[str, Any]:
        names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
        return {name: name for name in names + alone}

    found = {name: name for name in stock}
    found |= from_original(both(original + _ORIGINAL_TOP, tables))
    table = {_flat(spelled): name for name, spelled in found.items() if name in stock}
    found = from_diffusers(both(_DIFFUSERS_TOP, ["scale_shift_table"]))
    table |= {_flat(spelled): name for name, spelled in found.items() if name in stock}
    return table | {_flat(name): name for name in stock}


def _target(key: str, role: str, spellings: Mapping[str, str]) -> str | None:
    """The stock name of what a key changes."""
    ends = {"diff_b": [".bias"], "up_bias": [".bias"], "diff_m": [".modulation"]}
    ends = ends.get(role, [".weight", ""] if role == "diff" else [".weight"])
    found = (spellings.get(_flat(_module(key) + end)) for end in ends)
    return next(filter(None, found), None)


def _assign(
    entries: Mapping[str, Entry], spellings: Mapping[str, str]
) -> tuple[dict[str, dict[str, Entry]], dict[str, list[str]]]:
    """Sorts the entries. -> by stock name, those of its change by their roles; and the keys with a
    fault, by fault."""
    parts: dict[str, dict[str, Entry]] = {}
    faults: dict[str, list[str]] = {}
    for key, entry in entries.items():
        role = _role(key)
        name = role and _target(key, role, spellings)
        if kind := _foreign(key):
            fault = f"of {kind}, which is not supported,"
        elif name is None:
            fault = "without a counterpart in this model"
        elif role in parts.get(name, {}):
            fault = "twice"
        elif entry.dtype not in DTYPES and role != "alpha":
            fault = "not of floating point"
        else:
            parts.setdefault(name, {})[role] = entry
            continue
        faults.setdefault(fault, []).append(key)

    for name, roles in parts.items():  # a bias of lora_B is multiplied as its matrix is
        weight = parts.get(f"{name.removesuffix('.bias')}.weight", {})
        if "up_bias" in roles:
            roles |= {role: weight[role] for role in ("down", "alpha") if role in weight}
    return parts, faults


def _mismatches(roles: Mapping[str, Entry], shape: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """(fault, key) of what does not fit together, or not into a tensor of this shape."""

    def bare(shape: Iterable[int]) -> list[int]:
        return [size for size in shape if size != 1]

    down, alpha = roles.get("down"), roles.get("alpha")
    up = roles.get("up") or roles.get("up_bias")
    if alpha is not None and math.prod(alpha.shape) != 1:
        yield "of another shape", f"{alpha.key} {list(alpha.shape)} instead of [1]"
    if None in (down, up):
        yield from (("without the other half", x.key) for x in (down, up, alpha) if x is not None)
    elif "up" in roles:
        fits = up.shape[:1] == shape[:1] and math.prod(down.shape[1:]) == math.prod(shape[1:])
        if not fits or math.prod(up.shape[1:]) != down.shape[0] or not down.shape[0]:
            sizes = f"{list(up.shape)} x {list(down.shape)} instead of {list(shape)}"
            yield "of another shape", f"{up.key} {sizes}"
    for role in ("diff", "diff_b", "diff_m", "up_bias"):
        if role in roles and bare(roles[role].shape) != bare(shape):
            sizes = f"{list(roles[role].shape)} instead of {list(shape)}"
            yield "of another shape", f"{roles[role].key} {sizes}"


def _numbers(entry: Entry) -> Tensor:
    """fp8, in which nothing can be computed, as fp32."""
    tensor = entry.read()
    return tensor.float() if entry.dtype == FP8_CODE else tensor


def _delta(module: str, read: Mapping[str, Tensor], factors: Factors) -> Delta:
    alpha, factor = read.get("alpha"), 1.0
    if "down" in read:
        alpha = None if alpha is None else alpha.item()
        factor = factors.of(module, len(read["down"]), alpha)
    diffs = [read[role] for role in ("diff", "diff_b", "diff_m") if role in read]
    if "up_bias" in read:
        diffs.append(factor * read["up_bias"])
    diff = sum(diffs[1:], diffs[0]) if diffs else None
    if "up" not in read:
        return Delta(diff=diff)
    return Delta(read["down"], read["up"], factor, diff)
