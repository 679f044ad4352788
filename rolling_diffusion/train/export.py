"""Writes the embedded model as a diffusers folder: FluxPipeline's parts, with a card; safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from ..loading import plainly
from ..world.caption import ALONE, digits
from .text import CLIP_IDS, LENGTH, T5_IDS, grow

CARD = {
    "trained": True,
    "size": 256,
    "steps": 20,
    "cfg": 2.5,
    "max_sequence_length": LENGTH,
    "window": None,
    "native_tokens": 1024,
}
SHIFT = 2.0  # of the noise levels, towards noise
PARTS = ("vae", "text_encoder", "text_encoder_2", "transformer")  # that are trained


def word_tokenizer(ids: dict[str, int], start: str | None, end: str, pad: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are words: lower case, letters only, <unk> for words it does not know.

    "3 balls" are "three balls": a digit is read as its name, where that is a word that it knows.
    """
    tokenizer: Any = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    numbers = [normalizers.Replace(Regex(ALONE.format(digit)), name) for digit, name in digits(ids).items()]
    letters = [normalizers.Replace(Regex("[^a-z]+"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *numbers, *letters])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(token, ids[token]) for token in (start, end) if token]
    template = f"{start} $A {end}" if start else f"$A {end}"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    names = {"unk_token": "<unk>", "pad_token": pad, "eos_token": end, **({"bos_token": start} if start else {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH, **names)


def tokenizers() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """CLIP's and T5's, which give the ids of `text.clip_tokens` and `text.t5_tokens`."""
    end = "<|endoftext|>"
    return word_tokenizer(CLIP_IDS, "<|startoftext|>", end, end), word_tokenizer(T5_IDS, None, "</s>", "<pad>")


def export(folder: Path, transformer: Any, t5: Any, clip: Any, vae: Any, *, rolling: bool) -> None:
    """Replaces the folder. rolling: whether the model saw staggered noise; one that did not gets the stock defaults.

    The transformer is stored in bfloat16, the rest in float32: the model is small, and the decoder shows every bit.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    halved: Any = nn.Module.to(transformer, torch.bfloat16)
    halved.save_pretrained(partial / "transformer")
    nn.Module.to(transformer, torch.float32)
    t5.save_pretrained(partial / "text_encoder_2")
    _save_clip(clip, partial / "text_encoder")
    vae.save_pretrained(partial / "vae")
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(partial / "scheduler")
    for name, tokenizer in zip(("tokenizer", "tokenizer_2"), tokenizers()):
        tokenizer.save_pretrained(partial / name)
        # Releases of transformers name this class differently; all of them know the older name.
        _edit(partial / name / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    _edit(partial / "transformer" / "config.json", _class_name="FluxTransformer2DModel", _name_or_path=None)
    _edit(partial / "vae" / "config.json", block_out_channels=None, _name_or_path=None)
    card = CARD if rolling else {k: v for k, v in CARD.items() if k != "trained"}
    index = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderTiny"],
        "rolling": card,
    }
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _save_clip(clip: Any, folder: Path) -> None:
    """Saves CLIP under the names of its published checkpoints, which all releases of transformers read."""
    clip.save_pretrained(folder)
    weights = {f"text_model.{k.removeprefix('text_model.')}": v.contiguous() for k, v in clip.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def parts(folder: Path) -> tuple[AutoencoderTiny, tuple[T5EncoderModel, CLIPTextModel], FluxTransformer2DModel]:
    """VAE, text encoders and transformer of a folder that `export` wrote, in float32, to be trained further."""
    _check(folder)
    with plainly(str(folder)):
        vae = AutoencoderTiny.from_pretrained(folder / "vae")
        t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2").eval().requires_grad_(False)
        clip = CLIPTextModel.from_pretrained(folder / "text_encoder").eval().requires_grad_(False)
        transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    grow(t5, clip)
    return vae, (t5, clip), transformer


def _check(folder: Path) -> None:
    for name in PARTS:
        if not (folder / name / "config.json").is_file():
            raise ValueError(f"{folder} holds no {name}: name a folder that training has written")


def digest(folder: Path) -> str:
    """A hash of the files that `parts` reads: a folder may come to hold another model under the same name."""
    _check(folder)
    whole = hashlib.sha256()
    for file in sorted(file for name in PARTS for file in (folder / name).rglob("*") if file.is_file()):
        whole.update(f"{file.relative_to(folder).as_posix()}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()


def _edit(path: Path, **changes: Any) -> None:
    """Changes entries of a JSON file; None removes one."""
    entries = json.loads(path.read_text(encoding="utf-8")) | changes
    entries = {k: v for k, v in entries.items() if v is not None}
    path.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
