"""FLUX.1-dev's full structure with random weights: seconds, memory and arithmetic beside what the plan predicts.

python -m benchmarks.flux             the cases that benchmarks/flux.json does not hold yet; needs a GPU with 40 GB
python -m benchmarks.flux --dry-run   the same code with a small model, on any machine; keeps nothing
python -m benchmarks.flux --predict   the predictions alone, as docs/flux.md has them; runs nothing
python -m benchmarks.flux --table     what benchmarks/flux.json holds, as docs/flux.md has it; runs nothing
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rolling_diffusion.core.plan import Plan
from rolling_diffusion.defaults import Card, plan_for

RESULTS = Path(__file__).parent / "flux.json"
STEPS, TEXT, CELL = 20, 512, 8
SIZES = ((1024, 1024), (1024, 4096), (2048, 2048))  # width, height in pixels
PREDICTED = ((512, 512), (768, 768), *SIZES, (4096, 4096))
WAYS: dict[str, dict[str, Any] | None] = {  # None: diffusers' own FluxPipeline
    "FluxPipeline": None,
    "rolling, lag 0": {"lag": 0},
    "rolling": {},
    "block-autoregressive": {"lag": "autoregressive"},
}
FLUX = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24}
SMALL = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2}
CARD, DRY_CARD = Card(), Card(window=16, overlap=4)


def plan_of(width: int, height: int, way: dict[str, Any] | None, steps: int = STEPS, card: Card = CARD) -> Plan:
    """The plan for FLUX.1-dev at its defaults; FluxPipeline's is one without a lag."""
    return plan_for(
        card, height // CELL, width // CELL, steps, **({"lag": 0} if way is None else {"guide": "auto", **way})
    )


def arithmetic(plan: Plan, shape: dict[str, int], text: int = TEXT) -> float:
    """Floating-point operations of a run: 24 d² a token and layer, 4 d a query-key pair and layer, d the width."""
    cost, width = plan.cost(text, CARD.reach), 128 * shape["num_attention_heads"]
    layers = shape["num_layers"] + shape["num_single_layers"]
    return layers * (24 * width**2 * cost.token_evaluations + 4 * width * cost.pairs)


def predictions() -> str:
    """A Markdown table, each row against ordinary sampling of the same canvas."""
    lines = [
        "| canvas | sampling | model calls | tokens | operations | most tokens seen in a call | memory, bf16 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for width, height in PREDICTED:
        full = arithmetic(plan_of(width, height, None), FLUX)
        for name in ("rolling", "block-autoregressive"):
            plan = plan_of(width, height, WAYS[name])
            if len(plan.blocks) == 1:
                lines.append(
                    f"| {width}×{height} | {name} | {plan.ticks} | 1.00 | 1.00 | one block: ordinary sampling | none |"
                )
                continue
            cost = plan.cost(TEXT, CARD.reach)
            stored = min(CARD.reach, plan.height * plan.width // plan.multiple**2)
            gigabytes = stored * 2 * 57 * 3072 * 2 / 2**30
            lines.append(
                f"| {width}×{height} | {name} | {cost.calls} | "
                f"{cost.relative:.2f} | {arithmetic(plan, FLUX) / full:.2f} | "
                f"{cost.peak_visible_tokens:,} | {gigabytes:.1f} GiB |"
            )
    return "\n".join(lines)


class Bench:
    """Pipelines around one transformer of random weights; embeddings in place of the text encoders, no VAE."""

    def __init__(self, dry: bool) -> None:
        import torch
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

        from rolling_diffusion import roll

        self.dry, self.shape, self.compiled = dry, SMALL if dry else FLUX, False
        self.device, self.dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
        self.sizes = ((256, 256), (256, 512)) if dry else SIZES
        self.steps, self.text = (4, 16) if dry else (STEPS, TEXT)
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                self.model = FluxTransformer2DModel(
                    in_channels=64,
                    joint_attention_dim=4096,
                    pooled_projection_dim=768,
                    guidance_embeds=True,
                    **self.shape,
                ).eval()
        finally:
            torch.set_default_dtype(default)
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        vae = AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=16)  # for its factor of 8
        parts = dict(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None,
                     tokenizer_2=None, transformer=self.model)  # fmt: skip
        self.stock = FluxPipeline(**parts).to(self.device)
        self.stock.set_progress_bar_config(disable=True)
        self.rolling = roll(self.stock)
        self.embeds = torch.randn(1, self.text, 4096).to(self.device, self.dtype)
        self.pooled = torch.randn(1, 768).to(self.device, self.dtype)
        self.torch = torch

    def rate(self) -> float:
        """Operations a second in one large product of this dtype: what the matrix units reach here."""
        torch, n = self.torch, 512 if self.dry else 8192
        a = torch.randn(n, n, device=self.device, dtype=self.dtype)
        self.wait(a @ a)
        start = time.perf_counter()
        for _ in range(20):
            b = a @ a
        self.wait(b)
        return 20 * 2 * n**3 / (time.perf_counter() - start)

    def compile(self, wanted: bool) -> None:
        """Repeated blocks compiled from now on, or not."""
        if wanted != self.compiled:
            self.compiled = wanted
            for block in (*self.model.transformer_blocks, *self.model.single_transformer_blocks):
                block._compiled_call_impl = None
            if wanted:
                self.model.compile_repeated_blocks(dynamic=True)

    def wait(self, _: Any = None) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def run(self, width: int, height: int, way: dict[str, Any] | None) -> dict[str, float]:
        """Seconds, after a shorter run to warm up; GiB at the peak."""
        card = DRY_CARD if self.dry else CARD
        pipe, more = (
            (self.stock, {}) if way is None else (self.rolling, {"window": card.window, "overlap": card.overlap, **way})
        )

        def once(steps: int) -> float:
            start = time.perf_counter()
            out = pipe(
                prompt_embeds=self.embeds, pooled_prompt_embeds=self.pooled, width=width, height=height,
                num_inference_steps=steps,
                guidance_scale=3.5, output_type="latent", generator=self.torch.Generator().manual_seed(0), **more,
            )  # fmt: skip
            self.wait(out)
            return time.perf_counter() - start

        once(4)
        if self.device == "cuda":
            self.torch.cuda.reset_peak_memory_stats()
        seconds = once(self.steps)
        peak = self.torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else 0.0
        return {"seconds": seconds, "gibibytes": peak}


def measure(dry: bool) -> dict[str, Any]:
    """Runs what is missing and saves after each case, so that a run that was stopped goes on."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() and not dry else {}
    bench = Bench(dry)
    if not dry:
        found.setdefault("device", bench.torch.cuda.get_device_name())
    found.setdefault("operations a second", bench.rate())
    # What says most comes first, so that a run that was stopped has it.
    later = ("rolling, lag 0", "block-autoregressive")
    cases = [(compiled, *size, name) for compiled in (False, True) for size in bench.sizes for name in WAYS]
    cases.sort(key=lambda case: (case[3] in later and case[1:3] != bench.sizes[0], case[0]))
    for compiled, width, height, name in cases:
        key = f"{width}x{height}, {name}, {'compiled' if compiled else 'eager'}"
        if key in found or (dry and compiled):
            continue
        bench.compile(compiled)
        try:
            found[key] = bench.run(width, height, WAYS[name])
        except bench.torch.OutOfMemoryError:
            found[key] = {"out of memory": True}
        print(key, found[key], flush=True)
        if not dry:
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    return found


def table(found: dict[str, Any], dry: bool) -> str:
    """Measurements beside predictions, each against FluxPipeline on the same canvas and in the same mode."""
    lines = [
        "| canvas | sampling | mode | seconds | against FluxPipeline | predicted | of the matrix rate | GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    shape, steps, text, card = (SMALL, 4, 16, DRY_CARD) if dry else (FLUX, STEPS, TEXT, CARD)
    for key, row in found.items():
        if not isinstance(row, dict):
            continue
        size, mode = key.split(", ", 1)[0], key.rsplit(", ", 1)[1]
        name = key[len(size) + 2 : -len(mode) - 2]
        width, height = map(int, size.split("x"))
        if "seconds" not in row:
            lines.append(f"| {size} | {name} | {mode} | out of memory | | | | |")
            continue
        plan = plan_of(width, height, WAYS[name], steps, card)
        work = arithmetic(plan, shape, text)
        whole = arithmetic(plan_of(width, height, None, steps), shape, text)
        base = found.get(f"{size}, FluxPipeline, {mode}", {}).get("seconds")
        against = f"{row['seconds'] / base:.2f}" if base else ""
        share = work / row["seconds"] / found["operations a second"]
        lines.append(
            f"| {size} | {name} | {mode} | {row['seconds']:.2f} | {against} | {work / whole:.2f} | {share:.0%} | "
            f"{row['gibibytes']:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flux", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="a small model on the CPU; keeps nothing")
    parser.add_argument("--predict", action="store_true", help="print the predictions; run nothing")
    parser.add_argument("--table", action="store_true", help="print what was measured; run nothing")
    values = parser.parse_args()
    if values.predict:
        print(predictions())
        return 0
    if values.table:
        if not RESULTS.exists():
            print(f"Nothing has been measured yet: {RESULTS.name} is not there.")
            return 2
        print(table(json.loads(RESULTS.read_text()), dry=False))
        return 0
    import torch

    if not values.dry_run and not torch.cuda.is_available():
        print("This needs a GPU with 40 GB of memory; --dry-run and --predict need none.")
        return 2
    print(table(measure(values.dry_run), values.dry_run))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
