"""Hostile weights: torch files with code in them, safetensors whose headers lie, zip bombs."""

import json
import os
import pickle
import random
import struct
import zipfile
from functools import partial
from pathlib import Path

import torch
from corruptions import bare_copy
from trial import DEEP, MARKER, Trial

WEIGHTS = {  # subject -> a file of it that holds tensors
    "our folder": "model.safetensors",
    "fp8 folder": "model.safetensors",
    "diffusers folder": "diffusion_pytorch_model-00001-of-00002.safetensors",
    "safetensors file": "m.safetensors",
    "pipeline folder": "vae/diffusion_pytorch_model.safetensors",
    "JSON of a pipeline": "text_encoder/model.safetensors",
    "latent shard": "",
    "adapter": "adapter_model.safetensors",
}


class Payload:
    """Pickles to a call of `function`."""

    def __init__(self, function, *args):
        self.made = function, args

    def __reduce__(self):
        return self.made


def payloads(marker: Path) -> dict[str, object]:
    """Objects whose unpickling writes the marker."""
    write = f"open({str(marker)!r}, 'w').close()"
    touch = Payload(os.system, f"touch {marker}")
    return {
        "os.system": touch,
        "eval": Payload(eval, write),
        "exec": Payload(exec, write),
        "open": Payload(open, str(marker), "w"),
        "Path.touch": Payload(Path.touch, marker),
        "getattr": Payload(getattr, Payload(__import__, "os"), "system"),
        "import": Payload(__import__, "evil"),
        "nested": {"model": {"state_dict": [{"a": (1, touch)}]}},
        "as a key": {"x": torch.zeros(2), "meta": {"args": Payload(eval, write)}},
        "torch.load in it": Payload(torch.load, str(marker.with_name("inner.pkl"))),
        "bytes of a storage": Payload(torch.storage._load_from_bytes, pickle.dumps(touch)),
        "map over eval": Payload(list, Payload(map, eval, [write])),
    }


def pickled(dice: random.Random, subjects: dict, folder: Path) -> Trial:
    """A torch file with code, in every container and under every name."""
    what, made = dice.choice(list(payloads(folder / MARKER).items()))
    (folder / "inner.pkl").write_bytes(pickle.dumps(payloads(folder / MARKER)["os.system"]))
    (folder / "evil.py").write_text(f"open({str(folder / MARKER)!r}, 'w').close()\n")
    form = dice.choice(["zip", "before 1.6", "bare", "tar", "zip with a pickle alone"])
    place = dice.choice(["m.pth", "m.pt", "m.ckpt", "m.bin", "m.safetensors", "in a folder"])

    if place == "in a folder":
        path = bare_copy(subjects["our folder"], folder)
        (path / "model.safetensors").unlink()
        file = path / dice.choice(["pytorch_model.bin", "diffusion_pytorch_model.bin"])
    else:
        path = file = folder / place
    if form in ("zip", "before 1.6"):
        torch.save(made, file, _use_new_zipfile_serialization=form == "zip")
    elif form == "zip with a pickle alone":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(made))
            archive.writestr("archive/version", "3\n")
    else:
        file.write_bytes(pickle.dumps(made, protocol=dice.randint(0, 5)))
    load = subjects[dice.choice(["our folder", "adapter"])].load
    return Trial(f"pickle: {what}, {form}, {place}", partial(load, path))


def header(entries: object, size: int | None = None, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(shape, begin, end, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def broken_headers(entries: dict, data: bytes, size: int) -> dict:
    """Makers of files whose header is none, or too large. size: of the whole file."""
    return {
        "a header of 2**63 bytes": lambda: header(entries, 2**63, data),
        "a header of 2**40 bytes": lambda: header(entries, 2**40, data),
        "a header of 99 MB": lambda: header(b" " * 99_000_000),
        "a header beyond the file": lambda: header(entries, size * 2, data),
        "no header": lambda: header(b""),
        "metadata that is a list": lambda: header(entries | {"__metadata__": [1]}, None, data),
        "metadata of numbers": lambda: header(entries | {"__metadata__": {"a": 1}}, None, data),
        "a deep header": lambda: header(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
        "NaN in the header": lambda: header(b'{"a": NaN}'),
        "a list for a header": lambda: header(b"[]"),
        "UTF-16": lambda: header(json.dumps(entries).encode("utf-16"), None, data),
        "100,000 empty tensors": lambda: header({f"t{i}": tensor([0], 0, 0) for i in range(10**5)}),
        "a hole": lambda: header(entries, None, data + bytes(4096)),
        "a pickle": lambda: pickle.dumps({"a": 1}),
        "nothing": lambda: b"",
        "seven bytes": lambda: b"\0" * 7,
    }


def broken_entries(entries: dict, data: bytes, dice: random.Random) -> dict:
    """Makers of files one of whose entries lies."""
    names = [name for name in entries if name != "__metadata__"]
    one, two = dice.sample(names, 2)
    begin, end = entries[one]["data_offsets"]
    rest = {name: entry for name, entry in entries.items() if name != one}

    def changed(**what):
        return lambda: header(entries | {one: entries[one] | what}, None, data)

    def renamed(name: str):
        return lambda: header(rest | {name: entries[one]}, None, data)

    second = f", {json.dumps(one)}: {json.dumps(tensor([1], 0, 4))}}}".encode()
    return {
        "an end beyond the file": changed(data_offsets=[begin, len(data) + 4096]),
        "an end of 2**63": changed(data_offsets=[begin, 2**63]),
        "an end of 2**64": changed(data_offsets=[begin, 2**64]),
        "a begin after the end": changed(data_offsets=[end, begin]),
        "a negative begin": changed(data_offsets=[-4096, end - begin - 4096]),
        "tensors over each other": changed(data_offsets=entries[two]["data_offsets"]),
        "a shape of 2**62": changed(shape=[2**62]),
        "a shape that overflows": changed(shape=[2**32, 2**32, 2**32]),
        "a shape of 2**40 without numbers": changed(shape=[2**40, 0]),
        "a negative shape": changed(shape=[-1, -1]),
        "a thousand dimensions": changed(shape=[1] * 1000),
        "an unknown type": changed(dtype="F128"),
        "a type of half a byte": changed(dtype="F4"),
        "a type that is a list": changed(dtype=["F32"]),
        "a name of a megabyte": renamed("n" * 2**20),
        "an empty name": renamed(""),
        "a name that runs backwards": renamed(f"\u202e{one}"),
        "a name twice": lambda: header(json.dumps(entries)[:-1].encode() + second, None, data),
    }


def safetensors_of(dice: random.Random, whole: bytes) -> tuple[str, bytes]:
    """What is wrong, and a file; most are changes of a whole one."""
    size = struct.unpack("<Q", whole[:8])[0]
    entries, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    made = broken_headers(entries, data, len(whole)) | broken_entries(entries, data, dice)
    what = dice.choice(list(made))
    return what, made[what]()


def safetensors(dice: random.Random, subjects: dict, folder: Path) -> Trial:
    """A header that lies."""
    name, inner = dice.choice(list(WEIGHTS.items()))
    subject = subjects[name]
    path = bare_copy(subject, folder)
    file = path / inner if inner else path
    what, data = safetensors_of(dice, file.read_bytes())
    file.unlink()
    file.write_bytes(data)
    return Trial(f"safetensors: {what}, {name}", partial(subject.load, path))


def bomb(dice: random.Random, subjects: dict, folder: Path) -> Trial:
    """A zip that grows, has too many members, or lies about them."""
    kind = dice.choice(["deflated", "bzip2", "lzma", "members", "lying sizes", "outside names"])
    path = folder / dice.choice(["m.pth", "m.pt", "m.bin", "m.ckpt"])
    methods = {"bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}
    method = methods.get(kind, zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED)
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/version", "3\n")
        if kind == "members":
            for number in range(20_000):
                archive.writestr(f"archive/data/{number}", b"")
        elif kind == "outside names":
            archive.writestr(f"../../{MARKER}", "x")
            archive.writestr(f"{folder}/{MARKER}", "x")
            archive.writestr("archive/data.pkl", pickle.dumps({}))
        else:
            archive.writestr("archive/data.pkl", bytes(2**26))

    if kind == "lying sizes":
        data = path.read_bytes()
        place = data.rindex(b"PK\x01\x02")
        lie = struct.pack("<II", 2**32 - 2, 2**32 - 2)
        path.write_bytes(data[: place + 20] + lie + data[place + 28 :])
    load = subjects[dice.choice(["our folder", "adapter"])].load
    return Trial(f"zip: {kind}", partial(load, path))
