"""One latent shard: how it is written, opened, read by the row and checked against its hash.

A shard holds what training needs and nothing that a step would compute twice: normalised latents,
token ids of prompt and caption, and each distinct prompt's context once; its metadata says which
VAE, text encoder and tokenizer made it, and the SHA-256 of its data. Legend: N clips, U distinct
prompts, C context rows of width E, T text rows.
"""

import hashlib
import json
import os
import stat
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.config import PipelineConfig, read_pipeline_config
from engine.data.reading import read_at, read_header
from engine.errors import ModelFileError
from engine.files.manifest import NAME as MANIFEST
from engine.files.writing import replacing

FORMAT_VERSION = 1
RANKS = {  # of a shard's tensors
    "latents": 5,
    "prompt_tokens": 2,
    "prompt_lengths": 1,
    "caption_tokens": 2,
    "context_index": 1,
    "contexts": 3,
    "null_context": 2,
}
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
FLOATING = "latents", "contexts", "null_context"
INTEGERS = {"I32": torch.int32, "I64": torch.int64}
ON_DISK = "latents", "contexts"  # read by the row; the other tensors are held
CHANNELS, BLOCK = 16, 2**23  # of latents; bytes that are read and hashed at a time


class Shard:
    """One shard's open file.

    info: what `write_shard` says of it.
    sha256: of its data, "" in shards that were written before there was one.
    shapes: of its tensors.
    tensors: the small ones, integers in int32.

    Errors: ModelFileError for anything but a latent shard whose shapes fit each other, whose ids
        are not negative, whose lengths have their rows and whose indices have their contexts.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            length, header = self._open()
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            line = " ".join(str(error).split())[:160]
            raise ModelFileError(
                f"data: {path} must be a latent shard; got {line}. Run univigu preprocess."
            ) from None

        known = isinstance(self.info, dict)
        if not known or self.info.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            raise ModelFileError(
                f"data: {path} must have format version {FORMAT_VERSION}; got "
                f"{str(self.info)[:80]}. Run univigu preprocess again."
            )
        self.sha256 = self.info.get("sha256", "")

        self.shapes = {name: tuple(header[name]["shape"]) for name in RANKS}
        self._types = {name: (FLOATS | INTEGERS).get(header[name]["dtype"]) for name in RANKS}
        self._begins = {name: 8 + length + header[name]["data_offsets"][0] for name in RANKS}
        self._check_layout({name: header[name]["dtype"] for name in RANKS})

        self.tensors = {
            name: self._read(name, self.shapes[name], self._begins[name])
            for name in RANKS
            if name not in ON_DISK
        }
        self._check_numbers()
        for name in self.tensors.keys() - {"null_context"}:
            self.tensors[name] = self.tensors[name].int()

    def _open(self) -> tuple[int, dict]:
        """The length of the header, and what it says."""
        if not stat.S_ISREG(os.stat(self.path).st_mode):  # a FIFO would be waited for
            raise ValueError("no file, but a folder, pipe or device")
        # Not "pt", which maps a file privately: the system refuses one larger than its memory.
        with safe_open(self.path, "np") as file:
            self.info = json.loads((file.metadata() or {}).get("info", "{}"))
            missing = [name for name in RANKS if name not in file.keys()]
        if missing:
            raise ValueError(f"no {missing[0]}, which must be there beside {', '.join(RANKS)}")

        self.descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self.descriptor)
        return read_header(self.descriptor)

    def _check_layout(self, names: dict[str, str]) -> None:
        shapes = self.shapes
        types = dict.fromkeys(RANKS, INTEGERS) | dict.fromkeys(FLOATING, FLOATS)
        right = all(names[n] in types[n] and len(shapes[n]) == rank for n, rank in RANKS.items())
        right = right and all(all(shape[1:]) for shape in shapes.values())
        right = right and shapes["latents"][1] == CHANNELS
        right = right and not any(side % 2 for side in shapes["latents"][3:])
        same = [
            {shapes[name][:1] for name in RANKS if name not in ("contexts", "null_context")},
            {shapes["prompt_tokens"], shapes["caption_tokens"]},
            {shapes["contexts"][1:], shapes["null_context"]},
        ]
        if not right or any(len(these) > 1 for these in same):
            got = ", ".join(f"{name} {names[name]} {list(shapes[name])}" for name in RANKS)
            raise ModelFileError(
                f"data: {self.path} must hold latents [N,16,F,Y,X] with even Y and X, contexts "
                f"[U,C,E] and null_context [C,E] in floats, tokens [N,T], prompt_lengths [N] and "
                f"context_index [N] in integers; got {got}. Run univigu preprocess again."
            )

    def _check_numbers(self) -> None:
        most = dict.fromkeys(("prompt_tokens", "caption_tokens"), 2**31 - 1)
        most["prompt_lengths"] = self.shapes["prompt_tokens"][1]
        most["context_index"] = self.shapes["contexts"][0] - 1
        for name, highest in most.items():
            x = self.tensors[name]
            if len(x) and not 0 <= x.min() <= x.max() <= highest:
                raise ModelFileError(
                    f"data: {name} of {self.path} must be from 0 to {highest}; got {x.min()} to "
                    f"{x.max()}. Run univigu preprocess again."
                )
        if not isinstance(self.sha256, str):
            raise ModelFileError(
                f"data: sha256 of {self.path} must be a text; got {self.sha256!r:.80}. "
                "Run univigu preprocess again."
            )

    def __len__(self) -> int:
        return self.shapes["latents"][0]

    @property
    def bucket(self) -> tuple:
        """What samples of one batch have in common: shapes of latents, tokens and context."""
        return tuple(self.shapes[name][1:] for name in ("latents", "prompt_tokens", "contexts"))

    @property
    def largest_token(self) -> int:
        """The largest id of the prompts and captions; -1 without clips."""
        tokens = [self.tensors[name] for name in ("prompt_tokens", "caption_tokens")]
        return max((int(x.max()) for x in tokens if len(x)), default=-1)

    def row(self, name: str, index: int) -> Tensor:
        """One clip's latents or one prompt's context; nothing is kept. Errors: ModelFileError where
        the file became unreadable."""
        shape = self.shapes[name][1:]
        size = torch.Size(shape).numel() * self._types[name].itemsize
        return self._read(name, shape, self._begins[name] + index * size)

    def verify(self) -> bool:
        """Read all of the data -> whether the shard has a hash of it. Errors: ModelFileError where
        that is another."""
        if not self.sha256:
            return False
        found = data_hash(
            (name, self._types[name], self.shapes[name], self._blocks(name)) for name in RANKS
        )
        if found != self.sha256:
            raise ModelFileError(
                f"data: {self.path} must hold the data of its SHA-256, {self.sha256[:16]}; got "
                f"{found[:16]}. Copy it again, or run univigu preprocess again."
            )
        return True

    def _blocks(self, name: str) -> Iterable[Tensor]:
        size = torch.Size(self.shapes[name]).numel() * self._types[name].itemsize
        begin = self._begins[name]
        block = torch.empty(min(size, BLOCK), dtype=torch.uint8)
        for offset in range(begin, begin + size, BLOCK):
            part = block[: begin + size - offset]
            self._fill(name, part, offset)
            yield part

    def _read(self, name: str, shape: tuple[int, ...], offset: int) -> Tensor:
        out = torch.empty(shape, dtype=self._types[name])
        self._fill(name, out, offset)
        return out

    def _fill(self, name: str, out: Tensor, offset: int) -> None:
        # By read and not by a map: a read lets the other threads run, and what a file has lost
        # is an error and not the end of the process.
        left = out.view(torch.uint8).numpy().reshape(-1)
        while left.size:
            try:
                count = read_at(self.descriptor, left, offset)
            except OSError as error:
                raise ModelFileError(f"data: {self.path} must be readable; got {error}.") from error
            if not count:
                raise ModelFileError(
                    f"data: {self.path} ends inside {name}: it was cut off while it was read. "
                    "Run univigu preprocess again."
                )
            left, offset = left[count:], offset + count


def verify_shard(path: str | Path) -> bool:
    """Check a shard and all of its data -> whether it has a hash to check them against. Errors:
    ModelFileError."""
    return Shard(path).verify()


def data_hash(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...], Iterable[Tensor]]]) -> str:
    """SHA-256 of tensors in the order of RANKS, each by its name, dtype, shape and bytes in
    blocks. Where they lie in a file does not matter."""
    found = hashlib.sha256()
    for name, dtype, shape, blocks in tensors:
        found.update(f"{name} {dtype} {list(shape)}\n".encode())
        for block in blocks:
            found.update(block.contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def data_fingerprint(folder: str | Path) -> dict[str, str | int]:
    """What of a pipeline folder decides a shard's content: the SHA-256 of each part's weights and
    configuration, and two settings of pipeline.json. Errors: ModelFileError."""
    folder = Path(folder)
    config = read_pipeline_config(folder)
    facts: dict[str, str | int] = {
        "latent_space": config.latent_space,
        "context_rows": config.context_rows,
    }

    for part in ("vae", "text_encoder", "tokenizer"):
        suffixes = {".json", ".safetensors", ".model", ".txt"}
        held = sorted(path for path in (folder / part).glob("*") if path.suffix in suffixes)
        files = [path for path in held if path.name != MANIFEST]
        if not files:
            raise ModelFileError(
                f"data: {folder} must hold {part}; got none. Give a whole pipeline folder."
            )

        digest = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{content} {path.name}\n".encode())
        facts[part] = digest.hexdigest()
    return facts


def write_shard(
    parts,
    made_with: dict,
    path: str | Path,
    latents: list[Tensor],
    texts: list[tuple[str, str]],
    config: PipelineConfig,
    source: dict,
) -> None:
    """Encodes the (prompt, caption) pairs with a pipeline's text encoder and writes them beside
    their latents fp16 [n,16,F,Y,X], complete or not at all.

    made_with: the `data_fingerprint` of the pipeline's folder.
    config: size, rate and text rows of the clips.
    source: where they come from.

    Errors: UsageError (text too long), ModelFileError."""
    prompt_rows = [parts.text.encode_rows(prompt, config.text_rows) for prompt, _ in texts]
    caption_rows = [parts.text.encode_rows(caption, config.text_rows) for _, caption in texts]

    prompts = sorted({prompt for prompt, _ in texts})
    index = {prompt: i for i, prompt in enumerate(prompts)}
    # 256 at a time, for the encoder's activations grow with the batch.
    chunks = [prompts[i : i + 256] for i in range(0, len(prompts), 256)]
    tensors = {
        "latents": torch.cat(latents),
        "prompt_tokens": torch.stack([ids for ids, _ in prompt_rows]),
        "prompt_lengths": torch.tensor([n for _, n in prompt_rows]),
        "caption_tokens": torch.stack([ids for ids, _ in caption_rows]),
        "context_index": torch.tensor([index[prompt] for prompt, _ in texts]),
        "contexts": torch.cat([parts.encode_prompts(chunk) for chunk in chunks]),
        "null_context": parts.encode_prompts([""])[0],
    }

    size = {name: getattr(config, name) for name in ("num_frames", "height", "width", "fps")}
    info = {"format_version": FORMAT_VERSION, "made_with": made_with, "count": len(texts)}
    held = ((name, tensors[name]) for name in RANKS)
    info["sha256"] = data_hash((name, x.dtype, tuple(x.shape), [x]) for name, x in held)

    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file(tensors, partial, {"info": json.dumps(info | size | {"source": source})})
    except (OSError, SafetensorError) as error:
        raise ModelFileError(
            f"data: {path} must be writable; got {error}. Check space and permissions."
        ) from error
