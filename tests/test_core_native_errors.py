"""An error that torch itself raises inside a suspended sampler is an exception, not the end of the process."""

import subprocess
import sys

import pytest

SCRIPT = """
import torch
from rolling_diffusion.core.plan import make_plan
from rolling_diffusion.core.rollout import rollout

def broken(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for i in range(len(sigmas) - 1):
        x = model(x, sigmas[i] * x.new_ones([x.shape[0]]))
        if callback:
            callback({"i": i})
        if i == 2:
            x * None  # torch takes a native backtrace for this one
    return x

class Still:
    def denoise(self, moving, keep=False):
        return [m.x for m in moving]
    def commit(self, block, x0):
        pass
    def start(self, block):
        pass

plan = make_plan(16, 16, 5, window=8, overlap=4, draft=DRAFT)
noise = torch.randn(1, 4, 16, 16)
seen = []
levels = torch.linspace(1, 0, 6)
run = rollout(plan, Still(), broken, levels, lambda b: noise[..., b.rows, b.columns], callback=CALLBACK)
try:
    for block, x in run:
        seen.append(block)
except TypeError as error:
    print("an exception", len(seen), torch.is_grad_enabled())
"""


@pytest.mark.parametrize("draft, callback", [(0, "None"), (0, "print"), (2, "None")])
def test_a_torch_error_in_a_sampler_is_an_exception(draft, callback):
    script = SCRIPT.replace("DRAFT", str(draft)).replace("CALLBACK", "None" if callback == "None" else "lambda f: None")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-400:]}"
    assert done.stdout.split() == ["an", "exception", "0", "True"]
