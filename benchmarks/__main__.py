"""`make bench`: ratios on the embedded model, each pair interleaved in one run; writes benchmarks/results.md.

Rollout overhead at one block, measured time against the plan's predicted cost, and memory on and off.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from rolling_diffusion.core.plan import Plan, make_plan
from rolling_diffusion.core.rollout import Moving, rollout
from rolling_diffusion.models.denoiser import FluxDenoiser
from rolling_diffusion.models.flux import RollingFluxTransformer2DModel

from . import ratios

MODEL = Path(__file__).parent.parent / "rolling_diffusion" / "embedded"
SIDE, STEPS, TEXT = 32, 20, 32  # cells, steps, text tokens: a picture of 256×256 at the defaults


def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler's method, in the shape of k-diffusion's samplers: the same function runs plain and in the rollout."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(x.shape[0]), **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


class Bench:
    def __init__(self) -> None:
        self.model = RollingFluxTransformer2DModel.from_pretrained(MODEL / "transformer", torch_dtype=torch.float32)
        self.model.eval()
        levels = torch.linspace(1, 0, STEPS + 1)
        self.levels = 2 * levels / (1 + levels)  # the model's own shift, 2
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(1, 16, SIDE, SIDE, generator=generator)
        width = self.model.config["joint_attention_dim"]
        self.text = torch.randn(1, TEXT, width, generator=generator)
        self.pooled = torch.randn(1, self.model.config["pooled_projection_dim"], generator=generator)

    def denoiser(self, plan: Plan) -> FluxDenoiser:
        return FluxDenoiser(self.model, self.text, self.pooled, rule=plan.rule)

    @torch.no_grad()
    def plain(self) -> None:
        whole = make_plan(SIDE, SIDE, STEPS, window=SIDE, overlap=0)
        block, denoiser = whole.blocks[0], self.denoiser(whole)
        euler(lambda x, sigma: denoiser.denoise([Moving(block, x, sigma[0])])[0], self.noise, self.levels)

    @torch.no_grad()
    def roll(self, plan: Plan) -> None:
        noise = self.noise
        for _ in rollout(plan, self.denoiser(plan), euler, self.levels, lambda b: noise[..., b.rows, b.columns]):
            pass

    def overhead(self) -> list[str]:
        whole = make_plan(SIDE, SIDE, STEPS, window=SIDE, overlap=0)
        middle, every = ratios(lambda: self.roll(whole), self.plain, 60)
        return [
            "## Rollout overhead",
            f"One block of {SIDE}×{SIDE} cells, {STEPS} Euler steps: rollout against the plain sampler loop, the same",
            f"function and model. Median ratio of {len(every)} interleaved pairs: **{middle:.3f}**",
            f"(quartiles {every[len(every) // 4]:.3f} and {every[-len(every) // 4]:.3f}; target: below 1.02).",
        ]

    def cost(self) -> list[str]:
        lines = [
            "## Measured time against the plan's prediction",
            "Both relative to ordinary diffusion of the same canvas. Predicted: token evaluations, text in each call",
            "included. Small calls are dearer a token than large ones; the prediction leaves that out, and a small",
            "model shows it most.",
            "",
            "| plan | ticks | predicted | measured |",
            "| --- | --- | --- | --- |",
        ]
        for name, settings in {
            "window 16, overlap 8": {"window": 16, "overlap": 8},
            "window 16, overlap 8, draft 5": {"window": 16, "overlap": 8, "draft": 5},
            "window 24, overlap 16": {"window": 24, "overlap": 16},
            "block-autoregressive, 4 strips": {"window": 16, "overlap": 8, "lag": "autoregressive"},
            "spiral-out, window 16, overlap 0": {"window": 16, "overlap": 0, "order": "spiral-out"},
        }.items():
            plan = make_plan(SIDE, SIDE, STEPS, **settings)
            middle, _ = ratios(lambda plan=plan: self.roll(plan), self.plain, 5)
            cost = plan.cost(TEXT)
            lines.append(f"| {name} | {cost.ticks} | {cost.relative:.2f} | {middle:.2f} |")
        return lines

    def memory(self) -> list[str]:
        lines = [
            "## Memory on and off",
            "Four strips, window 16, overlap 8; time relative to ordinary diffusion of the same canvas.",
            "",
            "| memory | predicted | measured |",
            "| --- | --- | --- |",
        ]
        for name, settings in {
            "finished and waiting": {},
            "finished only": {"lookahead": 0},
            "waiting only": {"persistence": 0.0},
            "none": {"lookahead": 0, "persistence": 0.0},
        }.items():
            plan = make_plan(SIDE, SIDE, STEPS, window=16, overlap=8, **settings)
            middle, _ = ratios(lambda plan=plan: self.roll(plan), self.plain, 5)
            lines.append(f"| {name} | {plan.cost(TEXT).relative:.2f} | {middle:.2f} |")
        return lines


def main() -> None:
    bench = Bench()
    where = f"torch {torch.__version__.split('+')[0]}, {torch.get_num_threads()} threads, {platform.machine()}"
    parts = [["# Benchmarks", f"Written by `make bench` ({where}). Ratios, not seconds: machines differ."]]
    for part in (bench.overhead, bench.cost, bench.memory):
        parts.append(part())
        print("\n".join(parts[-1]), flush=True)
    path = Path(__file__).parent / "results.md"
    path.write_text("\n\n".join("\n".join(lines) for lines in parts) + "\n", encoding="utf-8")
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
