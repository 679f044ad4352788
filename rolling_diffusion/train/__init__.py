"""Training of the embedded model, end to end: autoencoder, text encoders, transformer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

STAGES = {"text": 1200, "decoder": 1500}  # steps
MINUTES = {"uniform": 250.0, "rolling": 180.0}  # of two CPU cores; docs/results.md tells of the shipped model
RATES = {"uniform": 2e-3, "rolling": 1e-3}  # of learning
FURTHER = 0.6  # of those rates, when what is trained is trained further


def run(
    folder: Path,
    work: Path,
    *,
    uniform_minutes: float = MINUTES["uniform"],
    rolling_minutes: float = MINUTES["rolling"],
    text_steps: int = STAGES["text"],
    decoder_steps: int = STAGES["decoder"],
    start: Path | None = None,
    batch: int = 1,
    workers: int = 0,
    device: str = "cpu",
    seed: int = 0,
    log: Callable[[str], object] = print,
) -> None:
    """Trains everything and writes a model folder. work: checkpoints and sample grids; a killed run resumes from them,
    and they take no other seed, steps, batch or start (ValueError); the minutes may change.

    The stages: text encoders, then the transformer on uniform noise and on the states of rolling, then the decoder,
    which nothing else waits for. With rolling_minutes 0 the folder holds a model that never saw staggered noise.
    start: a model folder made earlier; its transformer is trained further, at a lower rate, and its decoder; its text
    encoders are kept as they are, but for synonyms that they did not know. batch: how many times the pictures in a step
    that two CPU cores like; workers: processes that render them.
    """
    import numpy as np
    import torch
    from safetensors import SafetensorError
    from torch import nn

    from .checkpoint import agree
    from .diffusion import Source, new_transformer, train
    from .export import digest, export, parts
    from .labels import Questions
    from .samples import Samples
    from .text import train_text
    from .vae import linear_encoder, new_vae, pictures, train_decoder

    folder = folder.resolve()
    if work.resolve().is_relative_to(folder):
        raise ValueError(f"the checkpoints in {work} lie in {folder}, which is replaced: name another folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} holds other files, and would be replaced: name a new folder, or a model's")
    torch.manual_seed(seed)
    said = {"seed": seed, "text-steps": text_steps, "decoder-steps": decoder_steps, "batch": batch}
    agree(work, said | {"start": "nothing" if start is None else f"a model of SHA-256 {digest(start)[:16]}"})
    if start is None:
        vae = new_vae(pictures(np.random.default_rng(seed), 400))
        encoders = train_text(work / "text.safetensors", text_steps, seed=seed, log=log)
        transformer = new_transformer(seed)
    else:
        vae, encoders, transformer = parts(start)
    nn.Module.to(transformer, device)
    questions, samples = Questions(transformer).to(device), Samples(transformer, encoders, vae)
    for number, (stage, minutes) in enumerate({"uniform": uniform_minutes, "rolling": rolling_minutes}.items(), 1):
        if minutes:
            source = Source(linear_encoder(vae), encoders, seed + number, device)
            path = work / f"{stage}.safetensors"
            rate = RATES[stage] * (1.0 if start is None else FURTHER)
            more = {"batch": batch, "workers": workers, "log": log, "samples": samples}
            train(transformer, questions, source, path, stage, minutes, rate=rate, **more)
    questions.hook.remove()
    if decoder_steps:
        train_decoder(vae, work / "decoder.safetensors", decoder_steps, seed=seed, log=log)
    nn.Module.to(transformer, "cpu")
    try:
        export(folder, transformer, *encoders, vae, rolling=rolling_minutes > 0)
    except SafetensorError as error:  # of a full disk, where others have an OSError
        raise OSError(f"{folder}: {error}") from None
    log(f"The model is in {folder}")
