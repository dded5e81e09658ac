"""What the tests of sampling share."""

from collections import Counter

import pytest


@pytest.fixture
def calls(monkeypatch):
    """How often each module of a model is called, and with how many samples and rows."""
    seen = Counter()

    def watch(net):
        for name, module in net.named_modules():
            module.register_forward_hook(
                lambda m, args, out, name=name: seen.update(
                    [name, f"{name}:{tuple(args[0].shape[:2])}"]
                )
            )
        return seen

    return watch
