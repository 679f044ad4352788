"""The embedded text encoders: a word-level T5 and CLIP, taught to understand captions before any picture is drawn.

Binding a colour to its object and a place to both is learnt from text alone, in minutes: every word must tell the kind,
colour, place, count and relation of the thing it belongs to, and the hour and ground of the scene. The transformer
then has only to draw. (What small models learn last is binding and relation: arXiv 2601.06338.)
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from ..world.caption import SYNONYMS, TAG_SIZES, Caption, caption, split, typed, vocabulary
from ..world.scene import random_scene
from .checkpoint import pack, read, resuming, unpack, write

LENGTH = 32  # tokens of every prompt, padded; FluxPipeline's max_sequence_length for this model
T5_SPECIAL = ("<pad>", "</s>", "<unk>")
CLIP_SPECIAL = ("<pad>", "<|startoftext|>", "<unk>", "<|endoftext|>")
SETTING = {"time": 4, "ground": 4}


def word_ids(special: tuple[str, ...]) -> dict[str, int]:
    """Synonyms last: a model that was trained before they were known grows by their rows."""
    return {word: i for i, word in enumerate([*special, *vocabulary(), *SYNONYMS])}


T5_IDS, CLIP_IDS = word_ids(T5_SPECIAL), word_ids(CLIP_SPECIAL)


def t5_tokens(texts: list[str]) -> Tensor:
    """(B, 32) ids, as the saved T5 tokenizer gives them with padding to 32: words, </s>, <pad>…"""
    rows = [[*(T5_IDS.get(w, 2) for w in split(t)[: LENGTH - 1]), 1] for t in texts]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


def clip_tokens(texts: list[str]) -> Tensor:
    """(B, 32) ids, as the saved CLIP tokenizer gives them: start, words, end, end…"""
    rows = [[1, *(CLIP_IDS.get(w, 2) for w in split(t)[: LENGTH - 2]), 3] for t in texts]
    return torch.tensor([row + [3] * (LENGTH - len(row)) for row in rows])


def new_encoders() -> tuple[T5EncoderModel, CLIPTextModel]:
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(T5_IDS), d_model=128, d_kv=32, num_heads=4, d_ff=256, num_layers=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, use_cache=False,
        )
    )  # fmt: skip
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(CLIP_IDS), hidden_size=128, intermediate_size=512, num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH, projection_dim=128, pad_token_id=0, bos_token_id=1, eos_token_id=3,
        )
    )  # fmt: skip
    return t5, clip


@torch.no_grad()
def grow(t5: T5EncoderModel, clip: CLIPTextModel) -> None:
    """Teaches encoders that were trained before there were synonyms those words: each means what its older word does.

    ValueError if it is other words that they lack.
    """
    encoders: list[tuple[Any, dict[str, int]]] = [(t5, T5_IDS), (clip, CLIP_IDS)]
    for encoder, ids in encoders:
        known = encoder.get_input_embeddings().num_embeddings
        if known not in (len(ids), len(ids) - len(SYNONYMS)):
            raise ValueError(f"the text encoders know {known} words, and training speaks {len(ids)}: train them anew")
        if known < len(ids):
            encoder.resize_token_embeddings(len(ids), mean_resizing=False)
            rows = encoder.get_input_embeddings().weight
            for new, old in SYNONYMS.items():
                rows[ids[new]] = rows[ids[old]]
            encoder.requires_grad_(False)


@torch.no_grad()
def embed(t5: T5EncoderModel, clip: CLIPTextModel, texts: list[str]) -> tuple[Tensor, Tensor]:
    """(B, 32, 128) T5 states and (B, 128) pooled CLIP states, as FluxPipeline.encode_prompt computes them."""
    device = t5.device
    return t5(t5_tokens(texts).to(device)).last_hidden_state, clip(clip_tokens(texts).to(device)).pooler_output


class Questions(nn.Module):
    """The linear read-outs that the encoders are taught with; thrown away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.ModuleDict({k: nn.Linear(128, n) for k, n in (TAG_SIZES | SETTING).items()})
        self.pooled = nn.ModuleDict({k: nn.Linear(128, n) for k, n in SETTING.items()})
        self.present = nn.Linear(128, TAG_SIZES["kind"] * TAG_SIZES["colour"])

    def forward(self, states: Tensor, pooled: Tensor, truth: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(loss, share of captions in which every word's every answer is right)."""
        loss, right = states.new_zeros(()), torch.ones(len(states), dtype=torch.bool)
        for name, head in self.words.items():
            answer = truth[name] if name in TAG_SIZES else truth[name][:, None].expand(-1, LENGTH)
            logits = head(states)
            loss = loss + F.cross_entropy(logits.flatten(0, 1), answer.flatten())
            right &= (logits.argmax(-1) == answer).all(1)
        for name, head in self.pooled.items():
            loss = loss + F.cross_entropy(head(pooled), truth[name])
        loss = loss + F.binary_cross_entropy_with_logits(self.present(pooled), truth["present"])
        return loss, right.float().mean()


def lesson(rng: np.random.Generator, batch: int) -> tuple[list[str], dict[str, Tensor]]:
    """Captions and their true answers; one in thirty is empty, as the unconditional prompt is."""
    captions: list[Caption] = []
    for _ in range(batch):
        rate = (0.75, 0.5) if rng.random() < 0.7 else (rng.random(), rng.random())
        told = typed(caption(random_scene(rng), rng, *rate), rng)
        captions.append(Caption((), (), 0, 0) if rng.random() < 1 / 30 else told)
    tags = np.zeros((batch, LENGTH, len(TAG_SIZES)), np.int64)
    present = np.zeros((batch, TAG_SIZES["kind"] * TAG_SIZES["colour"]), np.float32)
    for i, told in enumerate(captions):
        for j, tag in enumerate(told.tags[: LENGTH - 1]):
            tags[i, j] = tag.thing, tag.kind, tag.colour, tag.place, tag.count, tag.relation
            if tag.thing:
                present[i, tag.kind * TAG_SIZES["colour"] + tag.colour] = 1
    truth = {name: torch.from_numpy(tags[..., k].copy()) for k, name in enumerate(TAG_SIZES)}
    truth["present"] = torch.from_numpy(present)
    truth["time"] = torch.tensor([c.time for c in captions])
    truth["ground"] = torch.tensor([c.ground for c in captions])
    return [c.text for c in captions], truth


def train_text(
    path: Path, steps: int, *, seed: int = 0, batch: int = 64, log=print
) -> tuple[T5EncoderModel, CLIPTextModel]:
    """Trains both encoders, or reads them back from path if that was done; returns them frozen."""
    torch.manual_seed(seed)
    t5, clip = new_encoders()
    if path.exists():
        tensors, _ = read(path)
        with resuming(path):
            t5.load_state_dict(unpack("t5", tensors))
            clip.load_state_dict(unpack("clip", tensors))
        return t5.eval().requires_grad_(False), clip.eval().requires_grad_(False)
    rng, heads, started = np.random.default_rng(seed + 1), Questions(), time.time()
    with torch.no_grad():  # T5 is made for large embeddings; small ones learn faster
        t5.shared.weight.normal_(0, 0.5)
    optimiser = torch.optim.AdamW([*t5.parameters(), *clip.parameters(), *heads.parameters()], 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for step in range(1, steps + 1):
        texts, truth = lesson(rng, batch)
        loss, right = heads(t5(t5_tokens(texts)).last_hidden_state, clip(clip_tokens(texts)).pooler_output, truth)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*t5.parameters(), *clip.parameters()], 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            spent, share = time.time() - started, right.item()
            log(f"text: step {step}, {spent:.0f} s, loss {loss.item():.3f}, understood {share:.2f}")
    write(path, pack("t5", t5.state_dict()) | pack("clip", clip.state_dict()), steps=steps)
    return t5.eval().requires_grad_(False), clip.eval().requires_grad_(False)
