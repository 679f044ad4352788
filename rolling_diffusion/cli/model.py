"""Which model: found and checked before it is loaded, put on a device, asked for the words it does not know."""

from __future__ import annotations

import argparse
import json
import logging
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pipeline import RollingFluxPipeline

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent.parent / "embedded"
WEIGHTS = (".safetensors", ".bin", ".gguf")
FILES = (".safetensors", ".sft", ".gguf")
QUANTIZERS = ("bnb-4bit", "bnb-8bit", "int8", "fp8")
DTYPES = ("auto", "float32", "bfloat16", "float16")
PARTS_WITHOUT_WEIGHTS = ("tokenizer", "tokenizer_2", "scheduler")


def locate(name: str) -> str:
    """A folder, a checkpoint file or a hub id for `name`; ValueError if a local one is missing or not whole."""
    path = EMBEDDED_FOLDER if name == EMBEDDED else Path(name).expanduser()
    if path.is_dir():
        check_folder(path)
        return str(path)
    if path.is_file():
        if path.suffix not in FILES:
            raise ValueError(f"--model {name} must be a folder, or a file that ends in {' or '.join(FILES)}")
        return str(path)
    if name == EMBEDDED:
        raise ValueError("the embedded model is missing from this installation: install the package again")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith(".") or path.suffix in FILES:
        raise ValueError(f"--model {name}: there is no such folder or file")
    return name


def check_folder(folder: Path) -> None:
    """ValueError unless every part that model_index.json names is in the folder, with its weights."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{folder} is not a model folder: it has no model_index.json")
    try:
        parts = json.loads(index.read_text())
    except ValueError:
        raise ValueError(f"{index} is not valid JSON") from None
    for part, kind in parts.items():
        if part.startswith("_") or not (isinstance(kind, list) and kind[0]):
            continue
        if not (folder / part).is_dir():
            raise ValueError(f"the model folder {folder} has no {part} folder, which its model_index.json names")
        files = [file.name for file in (folder / part).iterdir()]
        if not any(name.endswith(".json") for name in files):
            raise ValueError(f"{part} in the model folder {folder} has no configuration")
        if part not in PARTS_WITHOUT_WEIGHTS and not any(name.endswith(WEIGHTS) for name in files):
            raise ValueError(f"{part} in the model folder {folder} has no weights")


def device_named(name: str) -> str:
    """The device to use; "auto" takes a GPU where there is one. ValueError if it is unknown or absent."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is unknown: take auto, cpu, cuda, cuda:1 or mps") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= count.get(device.type, 1):
        raise ValueError(f"--device {name} is not on this machine: leave --device out, or take cpu")
    return name


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """Words of the prompt that the tokenizer has no entry for, in order, each once."""
    if getattr(tokenizer, "unk_token_id", None) is None:
        return []
    words = dict.fromkeys(re.findall(r"\w+", prompt.lower()))
    return [w for w in words if tokenizer.unk_token_id in tokenizer(w, add_special_tokens=False).input_ids]


def known_words(tokenizer: Any) -> list[str]:
    """The tokenizer's words, sorted, without its special tokens."""
    special = set(tokenizer.all_special_tokens)
    return sorted(w for w in tokenizer.get_vocab() if w not in special and w.isalpha())


def load(folder: str, device: str, dtype: str, **options: Any) -> RollingFluxPipeline:
    """The pipeline of a folder, a checkpoint file or a hub id, silent; `options` are those of `pipeline.load`."""
    quiet()
    import torch

    from ..pipeline import load as read

    with warnings.catch_warnings():
        # Releases of diffusers disagree about the name of dtype: all of them take torch_dtype, and the newest warn.
        warnings.simplefilter("ignore", FutureWarning)
        pipeline = read(folder, None if dtype == "auto" else getattr(torch, dtype), device, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def lora(text: str) -> tuple[str, float]:
    """Type of --lora: a file, a folder or a hub id, and after = a strength, 1 if there is none."""
    name, mark, strength = text.rpartition("=")
    if not mark:
        return text, 1.0
    try:
        return name, float(strength)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes NAME or NAME=STRENGTH, and {strength!r} is no number") from None


def quiet() -> None:
    """Keeps the libraries' own notes and bars off the terminal: what matters comes as an error."""
    for name in ("torchao", "torch.utils._pytree"):  # torchao's import says what it cannot speed up, even when unused
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
