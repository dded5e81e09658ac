"""On a GPU: a run and a training step find all their kernels compiled ahead, launchers included."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu
SCRIPT = """
import os, sys
from dataclasses import replace
from pathlib import Path
import torch, engine
from engine import graphs, sample
from engine.schedule import schedule
from engine.train import TrainState, train_step
from engine.train.ahead import Ahead
from engine.run import Run

def files():
    return {path for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*") if path.is_file()}

mode, dtype = sys.argv[1], getattr(torch, sys.argv[2])
cfg = replace(engine.ModelConfig.preset("tiny"), heads=4, head_dim=128, vocab=1000, layers=3)
model = engine.UniViGU(cfg, "cuda", dtype)
latents, ids = torch.randn(2, 16, 3, 16, 24).cuda(), torch.zeros(2, 24, dtype=torch.int64).cuda()
context, null = torch.zeros(2, 2, 512, cfg.text_dim, device="cuda")
context[:, : 0 if mode == "v2t" else 20], null[:, :1] = 0.5, -0.5
if mode == "train":
    state = TrainState.create(model, engine.TrainConfig(batch_size=2))
    batch = {"latents": latents, "prompt_tokens": ids, "caption_tokens": ids, "context": context}
    batch |= {"prompt_lengths": ids[:, 0] + 3, "null_context": null[0]}
    count, step = Ahead(state)(batch), lambda: train_step(state, batch)
else:
    plan, still = schedule(mode, 4, 3.0, "unipc", "exact"), mode == "v2t"
    given = [plan, latents, ids, context, None if still else null, 4.0]
    request = sample.Request(*given, seeds=[0, 1], refresh_every=4 if still else 1)
    count = graphs.Ahead(model.eval())(request)
    step = lambda: list(Run(model, request).steps())
before = files()
step()
torch.cuda.synchronize()
late = sorted(path.name for path in files() - before)
assert count and not late, (count, late)
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("mode", ["t2vt", "v2t", "train"])
def test_nothing_is_compiled_after_the_first_step_began(mode, dtype, tmp_path):
    variables = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, mode, dtype]
    process = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
