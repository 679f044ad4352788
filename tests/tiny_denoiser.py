"""A sampler, a plan and a denoiser so small that a test can write down all they do."""

import torch

from rolling_diffusion.core.plan import Plan, make_plan
from rolling_diffusion.core.rollout import rollout

S = 4
SIGMAS = torch.linspace(1, 0, S + 1)


def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """As k-diffusion's, but blind to grad mode."""
    for i in range(len(sigmas) - 1):
        x0 = model(x, sigmas[i] * x.new_ones(x.shape[0]), **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "denoised": x0})
        x = x + (x - x0) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


class Log:
    """A denoiser that writes down what it is asked."""

    inner_model = "the real one"

    def __init__(self):
        self.events = []

    def denoise(self, moving, keep=False):
        self.events.append(("keep" if keep else "denoise", [m.block.index for m in moving]))
        return [m.x / 2 for m in moving]

    def commit(self, block, x0):
        self.events.append(("commit", block.index))

    def start(self, block):
        self.events.append(("start", block.index))


def noise(block):
    return torch.ones(1, 1, block.height, block.width) + block.index


def plan_of(blocks=3, **given) -> Plan:
    """Strips of 4 rows, two of them in motion unless a lag is given."""
    return make_plan(4 * blocks, 4, S, **{"window": 8, "overlap": 4, **given})


TWO = {"blocks": 2, "window": 4, "overlap": 0}


def run(plan, denoiser=None, sampler=euler, sigmas=SIGMAS, **given):
    return [block.index for block, _ in rollout(plan, denoiser or Log(), sampler, sigmas, noise, **given)]
