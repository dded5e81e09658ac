"""Hostile documents: JSON that is none, that is too much of one, or whose values are absurd."""

import json
import random
from functools import partial
from pathlib import Path

from corruptions import bare_copy
from trial import DEEP, Trial

DOCUMENTS = {  # subject -> its JSON files
    "our folder": ["config.json", "sha256.json"],
    "our folder in shards": ["model.safetensors.index.json"],
    "diffusers folder": ["config.json", "diffusion_pytorch_model.safetensors.index.json"],
    "pipeline folder": [
        "pipeline.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "transformer/config.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
    ],
    "training checkpoint": ["step-00000002/manifest.json", "step-00000002/state.json"],
    "adapter": ["adapter_config.json"],
}


VALUES = [  # a name, and a value as JSON
    ("NaN", "NaN"),
    ("Infinity", "-Infinity"),
    ("1e400", "1e400"),
    ("5000 digits", "1" + "0" * 5000),
    ("2**63", str(2**63)),
    ("10**12", str(10**12)),
    ("0", "0"),
    ("-1", "-1"),
    ("a half", "0.5"),
    ("true", "true"),
    ("null", "null"),
    ("a text", '"1"'),
    ("a list", "[[[]]]"),
    ("an object", '{"a": {}}'),
    ("half a character", '"\\ud800"'),
    ("NUL", '"\\u0000"'),
    ("a text of 10 MB", '"' + "x" * 10**7 + '"'),
    ("depth", "[" * DEEP + "]" * DEEP),
    ("code", "\"__import__('os').system('touch RAN')\""),
]


ABSENT = '{"_class_name": "WanPipeline", "files": {}, "groups": {}}'  # where there is none yet
TEXTS = {  # whole documents
    "depth of lists": b"[" * DEEP + b"]" * DEEP,
    "depth of objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a list": b"[]",
    "a number of 5000 digits": b"1" + b"0" * 5000,
    "NaN": b"NaN",
    "nothing": b"",
    "NUL": b"\0" * 1000,
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "bad UTF-8": b'{"\xff\xfe": 1}',
    "an empty object": b"{}",
    "a million keys": b"{" + b",".join(b'"k%d":1' % i for i in range(10**6)) + b"}",
}


def document(dice: random.Random, subjects: dict, folder: Path) -> Trial:
    """A JSON file that is none, or one of whose values is absurd."""
    name = dice.choice(list(DOCUMENTS))
    inner = dice.choice(DOCUMENTS[name])
    subject = subjects[name]
    path = bare_copy(subject, folder)
    file = path / inner
    file.parent.mkdir(exist_ok=True)
    whole = file.read_text() if file.exists() else ABSENT
    said = json.loads(whole)
    file.unlink(missing_ok=True)

    if dice.random() < 0.3:
        what, data = dice.choice(list(TEXTS.items()))
        file.write_bytes(data)
        return Trial(f"JSON: {what} for {inner}", partial(subject.load, path), refuse=False)
    key = dice.choice(list(said))
    what, value = dice.choice(VALUES)
    if inner == "adapter_config.json" and dice.random() < 0.5:
        key, what, value = "alpha_pattern", "an expression", '{"((.|\\\\w)+)+!": 1}'
    twice = dice.random() < 0.2
    held = said if twice else {k: v for k, v in said.items() if k != key}
    text = json.dumps(held)[:-1] + (", " if held else "") + f"{json.dumps(key)}: {value}}}"
    file.write_text(text, errors="surrogatepass")
    what = f"JSON: {key[:30]} is {what}{', twice' if twice else ''} in {inner}"
    return Trial(what, partial(subject.load, path), refuse=False)
