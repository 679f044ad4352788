"""Training of the embedded transformer: flow matching on whole pictures, then on the states that rolling samples in.

The uniform stage shows the model whole canvases at one noise level, as FLUX.1-dev was trained. The rolling stage draws
a random plan and a random tick of it, and trains on that very state: blocks in motion at staggered levels, finished
blocks clean or in memory, waiting blocks in the call or in memory. A model trained on the states it will be sampled in
has no mismatch (Diffusion Forcing, 2407.01392); the most informative block never exceeds what a plan allows, which
is what per-token training needs (Patch Forcing, 2604.19141).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from ..core.memory import View
from ..core.order import ROUTES
from ..core.plan import make_plan
from ..models.call import Levels, run
from ..models.flux import Flux
from ..models.flux import pack as pack_cells
from ..world.caption import caption
from ..world.render import render
from ..world.scene import random_scene
from .checkpoint import Average, load_optimiser, optimiser_state, pack, read, resuming, unpack, write
from .labels import Questions, labels
from .text import embed
from .vae import encode

CONFIG = {
    "patch_size": 1, "in_channels": 64, "num_layers": 2, "num_single_layers": 5, "attention_head_dim": 128,
    "num_attention_heads": 2, "joint_attention_dim": 128, "pooled_projection_dim": 128, "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
DROP_CAPTION = 0.1
# Canvases in pixels (width, height), the batch that takes about as long on each, and their shares early and late.
CANVASES = ((128, 128, 32), (192, 192, 20), (256, 256, 14), (256, 384, 9), (384, 256, 9), (256, 512, 7))
EARLY, LATE = (0.8, 0.2, 0, 0, 0, 0), (0.25, 0.1, 0.55, 0.04, 0.02, 0.04)
SAMPLE_EVERY = 10  # minutes
LABELS = 0.3  # weight of the error about labels beside that of the velocity


def new_transformer(seed: int = 0) -> FluxTransformer2DModel:
    """A small Flux whose modulations and output start at zero (adaLN-Zero, 2212.09748)."""
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(**CONFIG)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
            if name.endswith("linear") or name == "proj_out":
                nn.init.zeros_(module.weight)
    return model


def optimisers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for all else."""
    hidden, other = [], []
    for name, p in model.named_parameters():
        matrix = p.ndim == 2 and "blocks" in name and "norm" not in name
        (hidden if matrix else other).append(p)
    return [
        torch.optim.Muon(hidden, lr=1.0, weight_decay=0.02, ns_steps=4, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@dataclass
class Batch:
    """Clean tokens (B, n, 64), noise alike, labels (B, n, 4), text (B, 32, 128), pooled (B, 128), ids (n, 3); rows and
    columns of tokens."""

    tokens: Tensor
    noise: Tensor
    labels: Tensor
    text: Tensor
    pooled: Tensor
    ids: Tensor
    rows: int
    columns: int


class Source:
    """Endless fresh scenes as batches."""

    def __init__(self, vae: tuple[Tensor, Tensor], encoders: tuple, seed: int, device: str = "cpu") -> None:
        self.vae, self.encoders, self.device = vae, encoders, device
        self.rng, self.generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)

    def draw(self, width: int, height: int, count: int) -> Batch:
        scenes = [random_scene(self.rng, width, height) for _ in range(count)]
        texts = ["" if self.rng.random() < DROP_CAPTION else caption(s, self.rng).text for s in scenes]
        x = torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2).float() / 255
        tokens = pack_cells(encode(x, self.vae[0], self.vae[1]))
        text, pooled = embed(self.encoders[0], self.encoders[1], texts)
        noise = torch.randn(tokens.shape, generator=self.generator)
        y, x_ = torch.meshgrid(torch.arange(height // 16), torch.arange(width // 16), indexing="ij")
        ids = torch.stack([torch.zeros_like(y), y, x_], -1).flatten(0, 1).float()
        on = (x.to(self.device) for x in (tokens, noise, labels(scenes), text, pooled, ids))
        return Batch(*on, rows=height // 16, columns=width // 16)

    def levels(self, count: int) -> Tensor:
        """(count,) noise levels, logit-normal, to the noisy side, where a picture's plan is decided.

        Stratified: one level from each of count equally likely ranges, so that a batch shows them all.
        """
        share = (torch.randperm(count, generator=self.generator) + torch.rand(count, generator=self.generator)) / count
        return torch.sigmoid(1.6 + 1.1 * torch.special.ndtri(share.clamp(1e-4, 1 - 1e-4))).to(self.device)


def call(
    model: nn.Module,
    batch: Batch,
    x: Tensor,
    levels: Tensor,
    chosen: Tensor | None = None,
    index: Tensor | None = None,
    memory: View | None = None,
    keep: dict[int, tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """One model call on x (B, all tokens, 64), for the tokens `chosen` (None: all): their velocity.

    levels: (B, k); index: (chosen tokens,) which of them each has. keep: takes their keys and values, layer by layer.
    """
    request = {
        "hidden_states": x,
        "encoder_hidden_states": batch.text,
        "pooled_projections": batch.pooled,
        "img_ids": batch.ids,
        "txt_ids": batch.text.new_zeros(batch.text.shape[1], 3),
    }
    sink = None if keep is None else lambda layer, *kv: keep.__setitem__(layer, kv)
    tokens = torch.arange(x.shape[1], device=x.device) if chosen is None else chosen
    size = 2 * batch.rows, 2 * batch.columns
    with torch.autocast(x.device.type, torch.bfloat16):
        return run(Flux(model), model, request, tokens, size, Levels.of(levels, index), memory, sink)[0].float()


def uniform_loss(model: nn.Module, source: Source, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """(mean squared error of the velocity, None: all tokens were in the call), whole canvases, one level a sample."""
    t = source.levels(len(batch.tokens))[:, None, None]
    v = call(model, batch, batch.tokens.lerp(batch.noise, t), t[:, :, 0])
    return (v - (batch.noise - batch.tokens)).square().mean(), None


def rolling_loss(model: nn.Module, source: Source, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """(the same error over the blocks in motion, the tokens in the call), at a random tick of a random plan."""
    rng = source.rng
    h, w = 2 * batch.rows, 2 * batch.columns
    steps = 24
    draft = int(rng.choice([0, 4, 6, 6, 12]))
    orders = [route.name for route in ROUTES.values() if not route.late]  # one that is decided late is as random here
    order = str(rng.choice(orders, p=[0.35, *[0.65 / (len(orders) - 1)] * (len(orders) - 1)]))
    window = 2 * int(rng.integers(4, max(h, w) // 2 + 1))
    thick = 2 * int(rng.integers(2, max(3, window // 4 + 1)))
    lag = None if rng.random() < 0.6 else int(rng.integers(1, steps - draft + 1))
    plan = make_plan(
        h, w, steps, order, window, max(0, window - thick), draft, lag=lag, seed=int(rng.integers(1 << 20))
    )
    n = len(plan.blocks)
    owner = torch.empty(h // 2, w // 2, dtype=torch.long)
    for g, block in enumerate(plan.blocks):
        owner[block.top // 2 : (block.top + block.height) // 2, block.left // 2 : (block.left + block.width) // 2] = g
    owner = owner.flatten()
    tick = draft + int(rng.integers(max(1, plan.ticks - draft)))
    step = torch.tensor([plan.index(tick, g) for g in range(n)])
    after = torch.tensor([plan.index(tick + 1, g) for g in range(n)])
    moving, finished, waiting = after > step, step >= steps, (step <= draft) & (after == step)
    if not moving.any():
        return uniform_loss(model, source, batch)
    # Every schedule that a sampler may use is some shift of the even one; levels lie anywhere within a step.
    shift = float(np.exp(rng.uniform(np.log(0.8), np.log(4))))
    even = 1 - (step + moving * torch.rand(len(batch.tokens), 1, generator=source.generator)) / steps
    even = even.to(source.device)
    levels = (shift * even / (1 + (shift - 1) * even)).clamp(min=0)
    seen = str(rng.choice(["call", "memory", "finished", "nothing"], p=[0.35, 0.45, 0.12, 0.08]))
    noisy = batch.tokens.lerp(batch.noise, levels[:, owner, None])
    memory = None
    if seen == "call":
        chosen = torch.arange(len(owner))
    else:
        chosen = moving[owner].nonzero()[:, 0]
        if seen != "nothing":
            memory = remember(model, batch, levels, owner, finished, waiting if seen == "memory" else None)
    # Only levels that tokens in the call have: the text takes the largest of them.
    present, index = owner[chosen].unique(return_inverse=True)
    v = call(model, batch, noisy, levels[:, present], chosen, index, memory)
    error = (v - (batch.noise - batch.tokens)[:, chosen]).square().mean(-1)
    weight = moving[owner[chosen]].float()
    return (error * weight).sum() / (weight.sum() * len(error)), chosen


@torch.no_grad()
def remember(
    model: nn.Module,
    batch: Batch,
    levels: Tensor,
    owner: Tensor,
    finished: Tensor,
    waiting: Tensor | None,
) -> View | None:
    """Keys and values as sampling would have stored them: waiting blocks from the draft, finished ones clean."""
    parts: list[dict[int, tuple[Tensor, Tensor]]] = []
    view = None
    if waiting is not None and waiting.any():
        store: dict[int, tuple[Tensor, Tensor]] = {}
        g = int(waiting.nonzero()[0])
        draft = levels[:, g : g + 1]
        call(model, batch, batch.tokens.lerp(batch.noise, draft[..., None]), draft, keep=store)
        some = waiting[owner].nonzero()[:, 0]
        parts.append({i: (k[:, some], v[:, some]) for i, (k, v) in store.items()})
        view = View([parts[0][i] for i in range(len(parts[0]))])
    if finished.any():
        some, store = finished[owner].nonzero()[:, 0], {}
        zero = levels.new_zeros(len(batch.tokens), 1)
        call(model, batch, batch.tokens, zero, some, memory=view, keep=store)
        parts.append(store)
    if not parts:
        return None
    layers = [tuple(torch.cat(x, 1) for x in zip(*(p[i] for p in parts))) for i in range(len(parts[0]))]
    return View(layers)  # type: ignore[arg-type]


def train(
    model: nn.Module,
    questions: Questions,
    source: Source,
    path: Path,
    stage: str,
    minutes: float,
    *,
    rate: float = 2e-3,
    decay_from: float = 0.75,
    log=print,
    samples: Callable[[Path], object] | None = None,
) -> None:
    """Trains one stage, "uniform" or "rolling", for minutes of wall-clock; saves to path; resumes from it.

    The rate is constant, then falls linearly from `decay_from` of the time on. samples: draws with the model's averaged
    weights into a file, every SAMPLE_EVERY minutes and at the end.
    """
    opts = [*optimisers(model), torch.optim.AdamW(questions.parameters(), lr=1.0, weight_decay=0.0)]
    average, step, spent = Average(model, 0.998), 0, 0.0
    if path.exists():
        tensors, facts = read(path)
        with resuming(path):
            model.load_state_dict(unpack("model", tensors))
            questions.load_state_dict(unpack("questions", tensors))
            average.values, average.steps = unpack("average", tensors), facts["step"]
            for i, opt in enumerate(opts):
                load_optimiser(opt, unpack(f"optimiser{i}", tensors))
            step, spent = facts["step"], facts["seconds"]
        source.rng, source.generator = np.random.default_rng(step), torch.Generator().manual_seed(step)
    model.train()
    started = time.time() - spent
    last_log, losses, seen, grids = time.time(), np.zeros((0, 2)), 0, int(spent / 60 / SAMPLE_EVERY)
    while (elapsed := time.time() - started) < 60 * minutes:
        progress = elapsed / (60 * minutes)
        shares = np.array(LATE if stage == "rolling" or progress > 0.2 else EARLY)
        width, height, count = CANVASES[int(source.rng.choice(len(CANVASES), p=shares / shares.sum()))]
        batch = source.draw(width, height, count)
        rolling = stage == "rolling" and source.rng.random() < 0.75
        loss, chosen = (rolling_loss if rolling else uniform_loss)(model, source, batch)
        doubt = questions(batch.labels if chosen is None else batch.labels[:, chosen])
        now = rate * min(1, (step + 1) / 100) * min(1, max(0.02, (1 - progress) / (1 - decay_from)))
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = now
            opt.zero_grad()
        (loss + LABELS * doubt).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
        average.update(model)
        step, seen = step + 1, seen + count
        losses = np.append(losses, [[loss.item(), doubt.item()]], 0)
        if time.time() - last_log > 60:
            rate_seen = seen / (time.time() - last_log)
            velocity, about = losses.mean(0)
            log(
                f"{stage}: step {step}, {elapsed:.0f} s, loss {velocity:.4f}, labels {about:.4f}, "
                f"{rate_seen:.1f} samples/s"
            )
            last_log, losses, seen = time.time(), np.zeros((0, 2)), 0
            _save(path, model, questions, average, opts, step, elapsed)
            if samples is not None and elapsed / 60 / SAMPLE_EVERY >= grids + 1:
                grids = int(elapsed / 60 / SAMPLE_EVERY)
                with average.instead_of(model):
                    samples(path.parent / "samples" / f"{stage}-{step:05}.png")
    _save(path, model, questions, average, opts, step, 60 * minutes)
    model.load_state_dict(average.values)
    model.eval()
    if samples is not None:
        samples(path.parent / "samples" / f"{stage}-{step:05}.png")


def _save(
    path: Path, model: nn.Module, questions: nn.Module, average: Average, opts: list, step: int, seconds: float
) -> None:
    tensors = pack("model", model.state_dict()) | pack("average", average.values)
    tensors |= pack("questions", questions.state_dict())
    for i, opt in enumerate(opts):
        tensors |= pack(f"optimiser{i}", optimiser_state(opt))
    write(path, tensors, step=step, seconds=seconds)
