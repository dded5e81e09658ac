"""Inputs and outputs of the network: prompts and captions, video files, the VAE."""

from engine.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".text": ("TextEncoder", "TextRows", "build_word_tokenizer", "save_tokenizer"),
        ".video": ("read_video", "write_video", "write_sidecar"),
        ".sheet": ("contact_sheet",),
        ".clip": ("StreamedClip", "read_clips"),
        ".subtitles": ("write_captions",),
    },
)
