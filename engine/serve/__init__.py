"""The HTTP server: the OpenAI video API, captions over chat, and the process that runs the jobs."""

from engine.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".settings": ("Settings",),
        ".program": ("serve",),
        ".cluster": ("serve_on_ray",),
    },
)
