"""Training of the embedded transformer: flow matching on whole pictures, then on the states that rolling samples in.

The uniform stage shows the model whole canvases at one noise level, as FLUX.1-dev was trained. The rolling stage draws
a random plan and a random tick of it, and trains on that very state: blocks in motion at staggered levels, finished
blocks clean or in memory, waiting blocks in the call or in memory. A model trained on the states it will be sampled in
has no mismatch (Diffusion Forcing, 2407.01392); the most informative block never exceeds what a plan allows, which
is what per-token training needs (Patch Forcing, 2604.19141).

A part of the batches are stretches of a world without end: pictures that attend, besides, to the last part of the
picture before them, which lies beyond their edge, finished, in memory. So are canvases drawn that have no end.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..core.memory import View
from ..core.order import ROUTES
from ..core.plan import make_plan
from ..models.call import Levels, run
from ..models.flux import Flux
from ..models.flux import pack as pack_cells
from ..world.caption import caption, typed
from ..world.render import render
from ..world.scene import Scene, random_scene
from ..world.strip import CHANGES, STEPS, follow
from .checkpoint import Average, load_optimiser, optimiser_state, pack, read, resuming, unpack, write
from .labels import TOKEN, Questions, labels
from .optimiser import autocast, optimisers
from .text import embed
from .vae import encode

CONFIG = {
    "patch_size": 1, "in_channels": 64, "num_layers": 2, "num_single_layers": 5, "attention_head_dim": 128,
    "num_attention_heads": 2, "joint_attention_dim": 128, "pooled_projection_dim": 128, "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
# Not cuDNN's: with memory beside a call's own tokens its gradient fails (torch 2.11 on an H100).
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
DROP_CAPTION = 0.1
# Canvases in pixels (width, height), the batch that takes about as long on each, and their shares early and late.
CANVASES = ((128, 128, 24), (192, 192, 15), (256, 256, 10), (256, 384, 7), (384, 256, 7), (256, 512, 5))
EARLY, LATE = (0.8, 0.2, 0, 0, 0, 0), (0.25, 0.1, 0.55, 0.04, 0.02, 0.04)
SAMPLE_EVERY = 30  # minutes
LABELS = 0.3  # weight of the error about labels beside that of the velocity
LEARN_TO_ASK = 100  # steps in which the questions alone learn from their errors, lest they mislead a trained model
# More of what is learnt last: which colour belongs to which thing, and which thing stands where.
SHAPES = {"one": 0.08, "two": 0.44, "count": 0.2, "relation": 0.2, "three": 0.08}
COLOUR_RATES = (1.0, 0.75, 0.0), (0.6, 0.2, 0.2)  # with which a caption names colours, and their shares
STAGGERED = 0.45  # share of the rolling stage's batches; all others are at one noise level, as drafts are
STRETCHES = 1 / 3  # share of batches that continue a picture, and on which side of them that one lies
SIDES = {"left": 0.45, "right": 0.2, "top": 0.2, "bottom": 0.15}
SEEN = (2, 8)  # tokens of that picture, from its edge on, that are in memory: least and most


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


@dataclass
class Sketch:
    """Clean tokens (B, n, 64), labels (B, n, 4), a caption each, ids (n, 3); rows and columns of the canvas; own: which
    tokens are the picture's. All others are of the picture before it."""

    tokens: Tensor
    labels: Tensor
    captions: list[str]
    ids: Tensor
    rows: int
    columns: int
    own: Tensor


@dataclass
class Batch(Sketch):
    """The same on the device of the computation (`own` on the CPU), with noise like the tokens, the captions' text
    (B, 32, 128) and pooled text (B, 128)."""

    noise: Tensor
    text: Tensor
    pooled: Tensor


class Source:
    """Endless fresh scenes as batches."""

    def __init__(self, vae: tuple[Tensor, Tensor], encoders: tuple, seed: int, device: str = "cpu") -> None:
        self.vae, self.device = vae, device
        self.encoders = encoders if device == "cpu" else tuple(copy.deepcopy(e).to(device) for e in encoders)
        self.seed(seed)

    def seed(self, *seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(int(self.rng.integers(2**62)))

    def finish(self, sketch: Sketch) -> Batch:
        """What is computed on the device, so that whoever renders need not."""
        tokens = sketch.tokens.to(self.device)
        text, pooled = embed(self.encoders[0], self.encoders[1], sketch.captions)
        noise = torch.randn(tokens.shape, generator=self.generator).to(self.device)
        labels, ids = sketch.labels.to(self.device), sketch.ids.to(self.device)
        rest = sketch.captions, ids, sketch.rows, sketch.columns, sketch.own
        return Batch(tokens, labels, *rest, noise=noise, text=text, pooled=pooled)

    def sketch(self, width: int, height: int, count: int, side: str | None = None) -> Sketch:
        """count pictures of so many pixels; side: where a part of the picture lies that each of them continues."""
        rng = self.rng
        silent = rng.random(count) < DROP_CAPTION
        pairs = [self._scenes(width, height, side, bool(s)) for s in silent]
        scenes = [scene for _, scene in pairs]
        rates = rng.choice(COLOUR_RATES[0], p=COLOUR_RATES[1], size=count)
        texts = ["" if s else typed(caption(x, rng, float(r)), rng).text for x, s, r in zip(scenes, silent, rates)]
        pictures = [render(scene) for scene in scenes]
        rows, columns = height // TOKEN, width // TOKEN
        truth = labels(scenes).unflatten(1, (rows, columns))
        own = torch.ones(rows, columns, dtype=torch.bool)
        top = left = 0  # of the picture on the canvas, in tokens
        if side is not None:
            seen = int(rng.integers(SEEN[0], SEEN[1] + 1))
            across, first = side in ("left", "right"), side in ("left", "top")
            part = slice(-seen * TOKEN, None) if first else slice(None, seen * TOKEN)
            for i, (last, _) in enumerate(pairs):
                beyond = render(last)[:, part] if across else render(last)[part]
                pictures[i] = np.concatenate([beyond, pictures[i]][:: 1 if first else -1], 1 if across else 0)
            pad = [seen, 0] if first else [0, seen]
            pad = pad if across else [0, 0, *pad]
            truth, own = nn.functional.pad(truth, [0, 0, *pad]), nn.functional.pad(own, pad)
            top, left = (0, pad[0]) if across else (pad[2], 0)
        # One at a time, so that each stays in the processor's cache: half of the time.
        tokens = torch.cat([self._tokens(picture) for picture in pictures])
        rows, columns = own.shape
        y, x_ = torch.meshgrid(torch.arange(rows) - top, torch.arange(columns) - left, indexing="ij")
        ids = torch.stack([torch.zeros_like(y), y, x_], -1).flatten(0, 1).float()
        return Sketch(tokens, truth.flatten(1, 2), texts, ids, rows, columns, own.flatten().nonzero()[:, 0])

    def _scenes(self, width: int, height: int, side: str | None, silent: bool) -> tuple[Scene, Scene]:
        """A scene that continues the other, where there is a side; silent: no word will tell of a change."""
        rng = self.rng
        scene = random_scene(rng, width, height, shapes=SHAPES)
        if side is None:
            return scene, scene
        # Up and down, the first picture shows the horizon, and all others hills or sky alone.
        rows = int(rng.integers(2)) * STEPS[side][1] * height
        last = replace(scene, x0=TOKEN * int(rng.integers(75)), y0=rows)
        return last, follow(rng, last, side, change=not silent and rng.random() < CHANGES, shapes=SHAPES)

    def _tokens(self, picture: np.ndarray) -> Tensor:
        x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
        return pack_cells(encode(x, self.vae[0], self.vae[1]))

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
    tokens = torch.arange(x.shape[1], device=x.device) if chosen is None else chosen.to(x.device)
    index = None if index is None else index.to(x.device)
    size = 2 * batch.rows, 2 * batch.columns
    with autocast(x.device.type), sdpa_kernel(ATTENTION):
        return run(Flux(model), model, request, tokens, size, Levels.of(levels, index), memory, sink)[0].float()


def uniform_loss(model: nn.Module, source: Source, batch: Batch) -> tuple[Tensor, Tensor]:
    """(mean squared error of the velocity, the tokens in the call), whole pictures, one level a sample."""
    t, own = source.levels(len(batch.tokens))[:, None, None], batch.own
    v = call(model, batch, batch.tokens.lerp(batch.noise, t), t[:, :, 0], own, memory=beyond(model, batch))
    return (v - (batch.noise - batch.tokens)[:, own]).square().mean(), own


def rolling_loss(model: nn.Module, source: Source, batch: Batch) -> tuple[Tensor, Tensor]:
    """(the same error over the blocks in motion, the tokens in the call), at a random tick of a random plan."""
    rng = source.rng
    rows, columns = (int(batch.ids[batch.own, i].max()) + 1 for i in (1, 2))  # of the picture
    h, w = 2 * rows, 2 * columns
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
    blocks = torch.empty(h // 2, w // 2, dtype=torch.long)
    for g, block in enumerate(plan.blocks):
        blocks[block.top // 2 : (block.top + block.height) // 2, block.left // 2 : (block.left + block.width) // 2] = g
    owner = torch.full((batch.tokens.shape[1],), n)  # n: of the picture before this one, no block of the plan
    owner[batch.own] = blocks.flatten()
    tick = draft + int(rng.integers(max(1, plan.ticks - draft)))
    step = torch.tensor([*(plan.index(tick, g) for g in range(n)), steps])
    after = torch.tensor([*(plan.index(tick + 1, g) for g in range(n)), steps])
    moving, finished, waiting = after > step, step >= steps, (step <= draft) & (after == step)
    finished[n] = waiting[n] = False
    if not moving.any():
        return uniform_loss(model, source, batch)
    # Every schedule that a sampler may use is some shift of the even one; levels lie anywhere within a step.
    shift = float(np.exp(rng.uniform(np.log(0.8), np.log(4))))
    even = 1 - (step + moving * torch.rand(len(batch.tokens), 1, generator=source.generator)) / steps
    even = even.to(source.device)
    levels = (shift * even / (1 + (shift - 1) * even)).clamp(min=0)
    seen = str(rng.choice(["call", "memory", "finished", "nothing"], p=[0.35, 0.45, 0.12, 0.08]))
    noisy = batch.tokens.lerp(batch.noise, levels[:, owner, None])
    memory, chosen = beyond(model, batch), batch.own
    if seen != "call":
        chosen = moving[owner].nonzero()[:, 0]
        if seen != "nothing":
            memory = remember(model, batch, levels, owner, finished, waiting if seen == "memory" else None, memory)
    # Only levels that tokens in the call have: the text takes the largest of them.
    present, index = owner[chosen].unique(return_inverse=True)
    v = call(model, batch, noisy, levels[:, present], chosen, index, memory)
    error = (v - (batch.noise - batch.tokens)[:, chosen]).square().mean(-1)
    weight = moving[owner[chosen]].float().to(error.device)
    return (error * weight).sum() / (weight.sum() * len(error)), chosen


Layers = dict[int, tuple[Tensor, Tensor]]  # keys and values


def _with(view: View | None, store: Layers) -> View:
    """The view, and after it what the store holds."""
    if view is None:
        return View([store[i] for i in range(len(store))])
    return View([tuple(torch.cat(x, 1) for x in zip(view.layer(i), store[i])) for i in range(len(store))])  # type: ignore[arg-type]


@torch.no_grad()
def beyond(model: nn.Module, batch: Batch) -> View | None:
    """Keys and values of the picture before this one, as sampling stores them: clean, of itself and the text alone."""
    if len(batch.own) == batch.tokens.shape[1]:
        return None
    others = torch.ones(batch.tokens.shape[1], dtype=torch.bool)
    others[batch.own] = False
    store: Layers = {}
    call(model, batch, batch.tokens, batch.tokens.new_zeros(len(batch.tokens), 1), others.nonzero()[:, 0], keep=store)
    return _with(None, store)


@torch.no_grad()
def remember(
    model: nn.Module,
    batch: Batch,
    levels: Tensor,
    owner: Tensor,
    finished: Tensor,
    waiting: Tensor | None,
    view: View | None,
) -> View | None:
    """Keys and values as sampling would have stored them, after those in view: waiting blocks from the draft, finished
    ones clean."""
    if waiting is not None and waiting.any():
        store: Layers = {}
        g = int(waiting.nonzero()[0])
        draft = levels[:, g : g + 1]
        noisy = batch.tokens.lerp(batch.noise, draft[..., None])
        call(model, batch, noisy, draft, batch.own, memory=view, keep=store)
        some = waiting[owner[batch.own]].nonzero()[:, 0]
        view = _with(view, {i: (k[:, some], v[:, some]) for i, (k, v) in store.items()})
    if finished.any():
        store = {}
        zero = levels.new_zeros(len(batch.tokens), 1)
        call(model, batch, batch.tokens, zero, finished[owner].nonzero()[:, 0], memory=view, keep=store)
        view = _with(view, store)
    return view


class Sketches(IterableDataset):
    """What a stage is shown, without end; each process that renders draws scenes of its own.

    late: whether the shares of canvases are those that training ends with. batch: how many times those of CANVASES.
    """

    def __init__(self, source: Source, late: Tensor, batch: int) -> None:
        self.source, self.late, self.batch = source, late, batch
        self.key = int(source.rng.integers(2**62))

    def __iter__(self) -> Iterator[Sketch]:
        source, worker = self.source, get_worker_info()
        if worker is not None:
            source.seed(self.key, worker.id)
        rng = source.rng
        while True:
            late = bool(self.late)
            shares = np.array(LATE if late else EARLY)
            width, height, count = CANVASES[int(rng.choice(len(CANVASES), p=shares / shares.sum()))]
            stretch = rng.random() < STRETCHES * late
            side = str(rng.choice(list(SIDES), p=list(SIDES.values()))) if stretch else None
            yield source.sketch(width, height, count * self.batch, side)


def train(
    model: nn.Module,
    questions: Questions,
    source: Source,
    path: Path,
    stage: str,
    minutes: float,
    *,
    rate: float = 2e-3,
    batch: int = 1,
    workers: int = 0,
    log=print,
    samples: Callable[[Path], object] | None = None,
) -> None:
    """Trains one stage, "uniform" or "rolling", for minutes of wall-clock; saves to path; resumes from it.

    The rate is constant, then falls linearly over the second half of the time. batch: how many times the batches of
    CANVASES; the rate grows with its fourth root. workers: processes that render (0: this one). samples: draws with the
    model's averaged weights into a file, every SAMPLE_EVERY minutes and at the end.
    """
    opts = [*optimisers(model), torch.optim.AdamW(questions.parameters(), lr=1.0, weight_decay=0.0)]
    average, step, spent = Average(model, 0.998), 0, 0.0
    if path.exists():
        tensors, facts = read(path)
        with resuming(path):
            model.load_state_dict(unpack("model", tensors))
            questions.load_state_dict(unpack("questions", tensors))
            known = unpack("average", tensors)
            for key, value in average.values.items():
                value.copy_(known[key])
            average.steps = facts["step"]
            for i, opt in enumerate(opts):
                load_optimiser(opt, unpack(f"optimiser{i}", tensors))
            step, spent = facts["step"], facts["seconds"]
        source.seed(step)
    rate *= batch**0.25
    late = torch.tensor(stage == "rolling").share_memory_()
    sketches = iter(DataLoader(Sketches(source, late, batch), batch_size=None, num_workers=workers))
    model.train()
    started = time.time() - spent
    last_log, losses, seen, grids = time.time(), [], 0, int(spent / 60 / SAMPLE_EVERY)
    while (elapsed := time.time() - started) < 60 * minutes:
        progress = elapsed / (60 * minutes)
        late.fill_(stage == "rolling" or progress > 0.2)
        pictures = source.finish(next(sketches))
        rolling = stage == "rolling" and source.rng.random() < STAGGERED
        loss, chosen = (rolling_loss if rolling else uniform_loss)(model, source, pictures)
        doubt = questions(pictures.labels[:, chosen], teach=step >= LEARN_TO_ASK)
        now = rate * min(1, (step + 1) / 100) * min(1, max(0.02, 2 * (1 - progress)))
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = now
            opt.zero_grad()
        (loss + LABELS * doubt).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
        average.update(model)
        step, seen = step + 1, seen + len(pictures.tokens)
        losses.append(torch.stack([loss.detach(), doubt.detach()]))
        if time.time() - last_log > 60:
            rate_seen = seen / (time.time() - last_log)
            velocity, about = torch.stack(losses).mean(0).tolist()
            log(
                f"{stage}: step {step}, {elapsed:.0f} s, loss {velocity:.4f}, labels {about:.4f}, "
                f"{rate_seen:.1f} samples/s"
            )
            last_log, losses, seen = time.time(), [], 0
            _save(path, model, questions, average, opts, step, elapsed)
            if samples is not None and elapsed / 60 / SAMPLE_EVERY >= grids + 1:
                grids = int(elapsed / 60 / SAMPLE_EVERY)
                with average.instead_of(model):
                    samples(path.parent / "samples" / f"{stage}-{step:05}.png")
    _save(path, model, questions, average, opts, step, elapsed)
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
