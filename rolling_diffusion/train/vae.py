"""The embedded autoencoder: an `AutoencoderTiny` whose encoder is written down and whose decoder is trained.

The encoder is a principal component analysis of 8×8 pixel patches, 192 numbers to 16. A TAESD-shaped encoder holds
such a linear map exactly: its first two stages only move pixels into channels, its third mixes them, and the biases
of its blocks keep every ReLU open. So latents are known before any training, cost one matrix product a patch while
training, and the decoder alone has to learn: from 16 numbers a patch, and their neighbours', back to crisp edges.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from ..world.render import render
from ..world.scene import random_scene
from .checkpoint import Average, load_optimiser, optimiser_state, pack, read, resuming, unpack, write
from .optimiser import autocast

Log = Callable[[str], object]
PATCH, CHANNELS, WIDTH = 8, 16, 64
LIFT = 24.0  # larger than any component's magnitude: keeps the ReLUs of the encoder's blocks open


def pictures(rng: np.random.Generator, count: int, width: int = 256, height: int = 256) -> Tensor:
    """Rendered scenes (count, 3, height, width) in 0 to 1."""
    stack = np.stack([render(random_scene(rng, width, height)) for _ in range(count)])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 255


def patches(x: Tensor) -> Tensor:
    """(B, 3, H, W) to (B, H/8, W/8, 192), ordered colour, row, column."""
    return x.unflatten(2, (-1, PATCH)).unflatten(4, (-1, PATCH)).permute(0, 2, 4, 1, 3, 5).flatten(3)


def principal_components(x: Tensor) -> tuple[Tensor, Tensor]:
    """(16, 192) weights and (16,) bias: the centred components of (B, 3, H, W) pictures in 0 to 1, scaled.

    Edges are rare and strong, so deviations mislead: each component is scaled so that 99.5 % of its values lie
    within ±2.5, inside the soft clamp at ±3 with which a TAESD-shaped decoder begins.
    """
    flat = patches(x).flatten(0, 2).double()
    mean = flat.mean(0)
    _, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    vectors = vectors.flip(1)[:, :CHANNELS]
    vectors = vectors * torch.where(vectors.sum(0) < 0, -1.0, 1.0)  # a sign of its own for each, always the same
    size = ((flat - mean) @ vectors).abs().sort(0).values[int(0.995 * len(flat))]
    weight = (vectors * (2.5 / size)).T
    return weight.float(), -(weight @ mean).float()


def write_encoder(vae: AutoencoderTiny, weight: Tensor, bias: Tensor) -> None:
    """Sets the encoder so that encode(x).latents is exactly weight @ patch + bias, up to rounding."""
    with torch.no_grad():
        layers: list[Any] = list(vae.encoder.layers)
        for p in vae.encoder.parameters():
            p.zero_()
        first, last = layers[0], layers[-1]
        for c in range(3):
            first.weight[c, c, 1, 1] = 1
        strided = [layer for layer in layers[1:-1] if isinstance(layer, nn.Conv2d)]
        # Stage 1 and 2: a 3×3 kernel at stride 2 and padding 1 sees pixel (dy, dx) of its 2×2 cell at (1 + dy, 1 + dx).
        for stage, channels in enumerate((3, 12)):
            for c in range(channels):
                for dy in range(2):
                    for dx in range(2):
                        strided[stage].weight[c * 4 + dy * 2 + dx, c, 1 + dy, 1 + dx] = 1
        # Stage 3 mixes: channel c of stage 2 holds pixel (y, x) of a 4×4 patch, both in binary, coarse bit last.
        filters = weight.unflatten(1, (3, PATCH, PATCH))
        for c in range(3):
            for y in range(PATCH):
                for x in range(PATCH):
                    channel = c * 16 + (y % 2) * 8 + (x % 2) * 4 + (y // 2 % 2) * 2 + (x // 2 % 2)
                    strided[2].weight[:CHANNELS, channel, 1 + y // 4, 1 + x // 4] = filters[:, c, y, x]
        third = layers.index(strided[2])
        lifting = layers[third + 1]
        lifting.conv[-1].bias[:CHANNELS] = LIFT
        for i in range(CHANNELS):
            last.weight[i, i, 1, 1] = 1
        last.bias[:] = bias - LIFT


def new_vae(x: Tensor) -> AutoencoderTiny:
    """An `AutoencoderTiny` with 16 latent channels, its encoder fitted to (B, 3, H, W) pictures in 0 to 1."""
    vae = AutoencoderTiny(latent_channels=CHANNELS, scaling_factor=1.0, shift_factor=0.0)
    write_encoder(vae, *principal_components(x))
    return vae


def linear_encoder(vae: AutoencoderTiny) -> tuple[Tensor, Tensor]:
    """(16, 192) and (16,): the map that `write_encoder` wrote, read back."""
    layers: list[Any] = list(vae.encoder.layers)
    strided = [layer for layer in layers[1:-1] if isinstance(layer, nn.Conv2d)]
    weight = torch.empty(CHANNELS, 3, PATCH, PATCH)
    for c in range(3):
        for y in range(PATCH):
            for x in range(PATCH):
                channel = c * 16 + (y % 2) * 8 + (x % 2) * 4 + (y // 2 % 2) * 2 + (x // 2 % 2)
                weight[:, c, y, x] = strided[2].weight.data[:CHANNELS, channel, 1 + y // 4, 1 + x // 4].float()
    return weight.flatten(1), layers[-1].bias.data.float() + LIFT


def encode(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, 3, H, W) in 0 to 1 to latents (B, 16, H/8, W/8): what the encoder computes, at the price of one product."""
    return (patches(x) @ weight.T + bias).permute(0, 3, 1, 2)


def decode(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Latents (B, 16, h, w) to (B, 3, 8h, 8w) in 0 to 1: the nearest pictures that `encode` maps to them."""
    flat = (z.permute(0, 2, 3, 1) - bias) @ torch.linalg.pinv(weight).T
    return flat.unflatten(3, (3, PATCH, PATCH)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3).clamp(0, 1)


def train_decoder(
    vae: AutoencoderTiny,
    path: Path,
    steps: int,
    *,
    seed: int = 0,
    batch: int = 16,
    pool: int = 1500,
    log: Log = print,
) -> None:
    """Trains the decoder on 64×64 crops for so many steps; saves to path; resumes from it.

    Loss: mean absolute error, on latents blurred by a little noise, since sampled latents are never exact.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    decoder: Any = vae.decoder.train()
    decoder.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(decoder.parameters(), 1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    average, step, spent = Average(decoder, 0.998), 0, 0.0
    if path.exists():
        tensors, facts = read(path)
        with resuming(path):
            decoder.load_state_dict(unpack("model", tensors))
            average.values, average.steps = unpack("average", tensors), facts["step"]
            load_optimiser(optimiser, unpack("optimiser", tensors))
            step, spent = facts["step"], facts["seconds"]
        rng = np.random.default_rng(seed + step)
    weight, bias = linear_encoder(vae)
    scenes = [(pictures(rng, 1)[0] * 255).byte() for _ in range(pool)]
    started = last = time.time() - spent
    losses: list[float] = []
    while step < steps:
        elapsed = time.time() - started
        crops = []
        for _ in range(batch):
            top, left = 8 * int(rng.integers(25)), 8 * int(rng.integers(25))
            crops.append(scenes[int(rng.integers(pool))][:, top : top + 64, left : left + 64])
        x = torch.stack(crops).float() / 255
        z = encode(x, weight, bias)
        z = z + 0.12 * torch.rand(batch, 1, 1, 1, generator=generator) * torch.randn(z.shape, generator=generator)
        with autocast("cpu"):
            y = decoder(z.contiguous(memory_format=torch.channels_last))
        loss = ((y.float() + 1) / 2 - x).abs().mean()
        rate = 1.5e-3 * min(1, (step + 1) / 100) * max(0.02, 1 - step / steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimiser.step()
        average.update(decoder)
        step += 1
        losses.append(loss.item())
        if time.time() - last > 30:
            last = time.time()
            log(f"decoder: step {step}, {elapsed:.0f} s, mean absolute error {np.mean(losses):.4f}")
            losses = []
            _save(path, decoder, average, optimiser, step, elapsed)
    _save(path, decoder, average, optimiser, step, time.time() - started)
    decoder.load_state_dict(average.values)
    decoder.eval()


def _save(
    path: Path, decoder: nn.Module, average: Average, optimiser: torch.optim.Optimizer, step: int, seconds: float
):
    tensors = pack("model", decoder.state_dict()) | pack("average", average.values)
    write(path, tensors | pack("optimiser", optimiser_state(optimiser)), step=step, seconds=seconds)
