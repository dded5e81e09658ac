"""Strings in and out: prompts become umT5 context rows, captions become text-row tokens and back.

Shape suffixes: B prompts, L tokens of a prompt, R rows, E width of the text encoder.
"""

import html
import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch.nn import functional as F

from engine.errors import ModelFileError, UsageError, go_on, require
from engine.files.reading import about, read_bytes, unreadable
from engine.media.load_part import load_part
from engine.media.umt5 import UMT5Encoder, dtype_of, keys_of

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
LONGEST = 100_000  # characters of a prompt: cleaning takes time that grows faster than its length
KEPT_BYTES = 64 << 20  # 409 prompts of 20 tokens in bf16, or 16 of 512


def clean_prompt(text: str) -> str:
    """Repair mojibake, resolve HTML entities written up to twice, and collapse white space.

    The same strings as diffusers' WanPipeline makes. Errors: MissingPackage without ftfy.
    """
    fixed = require("ftfy", "models").fix_text(text)
    return " ".join(html.unescape(html.unescape(fixed)).split())


def check_text(text: str) -> None:
    """Errors: UsageError for what is no Unicode text: half of a surrogate pair, which JSON's \\u
    and a command line in another encoding can give."""
    if not isinstance(text, str):
        raise UsageError(f"prompt: it must be a string; got {text!r}.")
    if len(text) > LONGEST:
        raise UsageError(f"prompt: it must have at most {LONGEST} characters; got {len(text)}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"prompt: it must be Unicode text; got {_shortened(text)!r}, with half a character at "
            f"{error.start}. Give it as UTF-8."
        ) from None


@dataclass(frozen=True)
class Encoded:
    """context [B, R, E] in the encoder's dtype: lengths [B] int64 real rows, then exact zeros."""

    context: torch.Tensor
    lengths: torch.Tensor


class TextRows:
    """A tokenizer and the two conversions that text rows need. umT5: pad id 0, EOS id 1."""

    def __init__(self, tokenizer):
        """tokenizer: a `tokenizers.Tokenizer` with <pad> that appends </s>; else
        ModelFileError."""
        self.tokenizer = tokenizer
        self.pad_id, self.eos_id = tokenizer.token_to_id(PAD), tokenizer.token_to_id(EOS)
        empty = tokenizer.encode("").ids
        if None in (self.pad_id, self.eos_id) or empty != [self.eos_id]:
            raise ModelFileError(
                f"tokenizer: it must have a pad token {PAD} and append an EOS token {EOS}; "
                f"got pad {self.pad_id}, EOS {self.eos_id}, '' -> {empty}. "
                "Use the tokenizer folder of the model."
            )

    @property
    def largest_id(self) -> int:
        """The largest id that a text can have."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TextRows":
        """Load `folder`/tokenizer. Errors: ModelFileError; MissingPackage without tokenizers."""
        return cls(load_tokenizer(Path(folder)))

    def encode_rows(self, text: str, rows: int) -> tuple[torch.Tensor, int]:
        """(ids int64 [rows], length): the tokens of `text` as written and EOS, then pad ids.

        length counts the EOS. Errors: UsageError for no Unicode text, and when the tokens and EOS
        need more than `rows`.
        """
        check_text(text)
        (ids,) = self._tokens([text], rows)
        padded = torch.full((rows,), self.pad_id, dtype=torch.int64)
        padded[: len(ids)] = torch.tensor(ids)
        return padded, len(ids)

    def decode_rows(self, ids: torch.Tensor) -> str:
        """The text of ids int64 [rows] up to the first EOS; special and unknown ids are dropped."""
        tokens = ids.tolist()
        if self.eos_id in tokens:
            tokens = tokens[: tokens.index(self.eos_id)]
        return self._string(tokens).strip()

    def _tokens(self, texts: list[str], rows: int) -> list[list[int]]:
        # One by one, for a batch starts threads, of which a later fork warns on stderr.
        tokens = [self.tokenizer.encode(text).ids for text in texts]
        for ids in tokens:
            if len(ids) > rows:
                tail = self._string(ids[rows - 1 : -1])
                raise UsageError(
                    f"prompt: text must be at most {rows} tokens; got {len(ids)}. "
                    f"Shorten it by {len(ids) - rows} tokens (cut tail: {_shortened(tail)!r})."
                )
        return tokens

    def _string(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class Kept:
    """Encodings of texts, at most `limit` bytes of them: those that were not used for longest go.
    Threads may share one."""

    def __init__(self, limit: int = KEPT_BYTES):
        self.limit, self.bytes = limit, 0
        self._rows: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> torch.Tensor | None:
        with self._lock:
            if key in self._rows:
                self._rows.move_to_end(key)
            return self._rows.get(key)

    def put(self, key: Hashable, rows: torch.Tensor) -> None:
        with self._lock:
            if key not in self._rows:
                self._rows[key] = rows
                self.bytes += rows.nbytes
            while self.bytes > self.limit:
                self.bytes -= self._rows.popitem(last=False)[1].nbytes


class TextEncoder(TextRows):
    """The frozen umT5 encoder and its tokenizer.

    tokenizer: as of `TextRows`.
    encoder: called with input_ids and attention_mask for features [B,L,E].
    device: where prompts are encoded; an encoder that is elsewhere is copied there for that long.
    """

    def __init__(self, tokenizer, encoder: UMT5Encoder, device: str | torch.device | None = None):
        super().__init__(tokenizer)
        self.encoder = encoder.eval().requires_grad_(False)
        self.device = encoder.device if device is None else torch.device(device)
        self.offloaded = self.device.type != encoder.device.type
        self.kept = Kept()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        offload: bool = False,
    ) -> "TextEncoder":
        """Load `folder`/text_encoder (safetensors) and `folder`/tokenizer, never from the network.

        offload: keep the weights on the CPU. Errors: ModelFileError for absent, damaged or
        incomplete files; MissingPackage.
        """
        tokenizer, path = load_tokenizer(Path(folder)), _subfolder(Path(folder), "text_encoder")
        dtypes = partial(dtype_of, dtype=dtype)
        encoder = load_part(UMT5Encoder, path, "cpu" if offload else device, dtypes, keys_of)
        text = cls(tokenizer, encoder, device)
        text._check_encoder()
        return text

    def _check_encoder(self) -> None:
        cfg = self.encoder.config
        if self.largest_id >= cfg.vocab_size:
            raise ModelFileError(
                f"tokenizer: tokenizer.json must have ids below the text encoder's vocab_size, "
                f"{cfg.vocab_size}; got {self.largest_id}. Use the two of one model."
            )
        for name, ours in (("pad_token_id", self.pad_id), ("eos_token_id", self.eos_id)):
            if getattr(cfg, name) not in (None, ours):
                raise ModelFileError(
                    f"text_encoder: {name} of config.json must be the tokenizer's, {ours}; got "
                    f"{getattr(cfg, name)}. Use the two of one model."
                )

    def _on_device(self, check: Callable[[], None]) -> Callable[..., torch.Tensor]:
        """The encoder as it is called on `device`. check: called before each weight is copied."""
        if not self.offloaded:
            return self.encoder
        copies = {}
        for name, tensor in chain(self.encoder.named_parameters(), self.encoder.named_buffers()):
            check()
            copies[name] = tensor.to(self.device)
        return lambda *given: torch.func.functional_call(self.encoder, copies, given)

    @torch.no_grad()
    def encode(
        self,
        prompts: list[str],
        rows: int = 512,
        allow_empty: bool = False,
        keep: bool = False,
        check: Callable[[], None] = go_on,
    ) -> Encoded:
        """Clean and encode prompts to context rows, as WanPipeline does up to rounding.

        Every text is encoded once and by itself, so that a prompt's context does not depend on what
        else is asked for: in a batch, rows of other lengths round apart by 1e-7, of which fp8 made
        other clips. The encoder runs on the prompt's L tokens, for padding to `rows` changes no
        real row. `allow_empty` admits "", the null condition of guidance.

        keep: take what this encoder made of the same tokens before, and keep what it makes now: 64
            MB on the encoder's device. Where all is there the encoder does not run, nor move. A
            change of its weights in place goes unseen.
        check: called before each layer of each text, and before each weight of an encoder that is
            copied; what it raises ends the encoding, of which texts that are whole stay kept.

        Errors: UsageError for an empty prompt or one of more than `rows` tokens, EOS included.
        """
        if isinstance(prompts, str) or not prompts:
            raise UsageError(
                f"prompt: prompts must be a non-empty list of strings; got {prompts!r}. "
                "Put a single prompt in a list."
            )
        for prompt in prompts:
            check_text(prompt)
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        if not allow_empty and not all(cleaned):
            raise UsageError(
                f"prompt: text must not be empty; got {prompts[cleaned.index('')]!r}. "
                "Say what the video shows."
            )
        tokens = [tuple(ids) for ids in self._tokens(cleaned, rows)]
        hidden = self._hidden(dict.fromkeys(tokens), self.kept if keep else Kept(), check)

        context_BRE = torch.stack(
            [F.pad(hidden[ids], (0, 0, 0, rows - len(ids))) for ids in tokens]
        )
        lengths_B = torch.tensor([len(ids) for ids in tokens], device=self.device)
        return Encoded(context_BRE, lengths_B)

    def _hidden(
        self, texts: Iterable[tuple[int, ...]], kept: Kept, check: Callable[[], None]
    ) -> dict[tuple[int, ...], torch.Tensor]:
        """The encoder's rows [L,E] of each text, by its tokens."""
        of = weakref.ref(self.encoder), self.device, self.encoder.dtype
        hidden = {ids: kept.get((of, ids)) for ids in texts}
        missing = [ids for ids, rows in hidden.items() if rows is None]
        if not missing:
            return hidden

        encoder = self._on_device(check)
        for ids in missing:
            ids_1L = torch.tensor([ids], device=self.device)
            found_1LE = encoder(ids_1L, torch.ones_like(ids_1L), check)
            hidden[ids] = found_1LE[0].to(self.encoder.dtype)
            kept.put((of, ids), hidden[ids])
        return hidden


def build_word_tokenizer(words: list[str]):
    """A `tokenizers.Tokenizer` of whole words: ids 0 <pad>, 1 </s>, 2 <unk>, then `words`.

    Text is lower-cased and split at white space, and </s> is appended. Errors: UsageError for words
    that repeat or that no text can hold.
    """
    vocabulary = [PAD, EOS, UNKNOWN, *words]
    wrong = [word for word in words if word.lower().split() != [word] or vocabulary.count(word) > 1]
    if wrong:
        raise UsageError(
            "tokenizer: words must be distinct, in lower case and without white space; "
            f"got {wrong[:5]}. Correct the list."
        )

    tokenizers = require("tokenizers", "models")
    ids = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, ids[EOS])]
    )
    tokenizer.add_special_tokens([PAD, EOS, UNKNOWN])
    return tokenizer


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write tokenizer.json, and tokenizer_config.json, from which transformers loads the same."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config = kind | {"pad_token": PAD, "eos_token": EOS, "unk_token": UNKNOWN}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(folder: Path):
    """The `tokenizers.Tokenizer` of `folder`/tokenizer/tokenizer.json, without padding and
    truncation.

    No other file there is read, so no code of the folder can run. Errors: ModelFileError;
    MissingPackage.
    """
    file = _subfolder(folder, "tokenizer") / "tokenizer.json"
    if not file.is_file():
        raise ModelFileError(
            f"tokenizer: {file} must be there and readable; got none. Save it with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    tokenizers = require("tokenizers", "models")
    with about("tokenizer"):
        content = read_bytes(file)
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises a bare Exception for a damaged file
            raise unreadable(file, error) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _subfolder(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_dir():
        raise ModelFileError(
            f"{name}: {folder} must hold a folder {name}; got none. "
            "Pass a model folder in the layout of diffusers."
        )
    return path


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:79]}…"
