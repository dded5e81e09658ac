"""Hostile videos: files that are none, that lie about what they hold, or that point elsewhere."""

import pickle
import random
import shutil
import struct
from functools import partial
from pathlib import Path

from trial import Trial


def elsewhere(secret: Path) -> dict[str, bytes]:
    """Files that name another one."""
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{secret}\n#EXT-X-ENDLIST\n"
    return {
        "a playlist": playlist.encode(),
        "a list of files": f"ffconcat version 1.0\nfile '{secret}'\n".encode(),
        "a session": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video 9 RTP/AVP 96\n",
        "an address": b"http://127.0.0.1:9/video.mp4\n",
        "SVG": f'<svg xmlns:x="http://x"><image x:href="file://{secret}"/></svg>'.encode(),
        "HTML": f"<html><video src='{secret}'></html>".encode(),
    }


def no_videos(dice: random.Random) -> dict[str, bytes]:
    """Files of other kinds, giants, and containers that begin well."""
    gif = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6)
    picture = b"\x2c" + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x44\x01\x00;"
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR"

    return {
        "a giant GIF": gif + picture,
        "a giant PNG": png + struct.pack(">II", 2**31 - 1, 2**31 - 1) + b"\x08\x06" + bytes(7),
        "a giant Y4M": b"YUV4MPEG2 W999999 H999999 F25:1\nFRAME\n",
        "a text": b"\x1b[2J" * 1000,
        "nothing": b"",
        "zeros": bytes(2**20),
        "noise": dice.randbytes(2**16),
        "a thousand boxes deep": b"".join(
            struct.pack(">I", 8 * (1000 - i)) + b"moov" for i in range(1000)
        ),
        "a pickle": pickle.dumps({"a": 1}),
        "AVI of lies": b"RIFF\xff\xff\xff\xffAVI LIST" + bytes(64) + b"hdrlavih",
        "Matroska of lies": b"\x1aE\xdf\xa3\x01\xff\xff\xff\xff\xff\xff\xff" + bytes(64),
        "Ogg of lies": b"OggS" + bytes(22) + b"\xff" * 256,
        "FLV of lies": b"FLV\x01\x05\0\0\0\x09" + b"\xff" * 256,
        "MPEG of lies": b"\x00\x00\x01\xba" + b"\xff" * 256,
        "TS of lies": (b"\x47\x40\x00\x10" + b"\xff" * 184) * 50,
    }


def lies(whole: bytes) -> dict[str, bytes]:
    """An mp4 with one number or box that is wrong."""

    def patched(name: bytes, at: int, value: bytes) -> bytes:
        place = whole.index(name) + at
        return whole[:place] + value + whole[place + len(value) :]

    most = struct.pack(">I", 2**32 - 1)
    return {
        "a giant box": struct.pack(">IQ", 1, 2**63) + b"moov" + whole,
        "boxes without end": whole[:32] + struct.pack(">I", 0) + b"moov" + whole[32:],
        "a million boxes": whole[:32] + (struct.pack(">I", 8) + b"free") * 10**6 + whole[32:],
        "a giant track": patched(b"tkhd", 80, struct.pack(">II", 2**31, 2**31)),
        "giant samples": patched(b"stsz", 8, struct.pack(">II", 2**31, 2**31)),
        "2**32 samples": patched(b"stsz", 12, most),
        "2**32 times": patched(b"stts", 8, most),
        "2**32 chunks": patched(b"stco", 8, most),
        "a rate of nothing": patched(b"mdhd", 16, bytes(8)),
        "a rate of 2**32": patched(b"mdhd", 16, most + struct.pack(">I", 1)),
        "a giant picture": patched(b"avc1", 28, struct.pack(">HH", 65535, 65535)),
        "an unknown codec": whole.replace(b"avc1", b"evil"),
        "a file elsewhere": whole.replace(b"url \0\0\0\1", b"url \0\0\0\0"),
    }


def video(dice: random.Random, subjects: dict, folder: Path) -> Trial:
    """An odd video under any name."""
    subject, secret = subjects["video"], folder / "secret.mp4"
    shutil.copy(subject.path, secret)
    pointing = elsewhere(secret)
    made = pointing | no_videos(dice) | lies(subject.path.read_bytes())
    what = dice.choice(list(made))
    ending = dice.choice(["mp4", "mov", "mkv", "webm", "avi", "gif", "ts", "flv", "m3u8", "x"])
    path = folder / f"v.{ending}"
    path.write_bytes(made[what])
    call = partial(subject.load, path)
    return Trial(f"video: {what}, {path.name}", call, refuse=what in pointing)
