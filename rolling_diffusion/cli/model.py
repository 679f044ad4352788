"""Which model: found and checked before it is loaded, put on a device, asked for the words it does not know."""

from __future__ import annotations

import argparse
import logging
import math
import re
import unicodedata
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..defaults import EMBEDDED, read_index

if TYPE_CHECKING:
    from ..pipeline import Rolling

EMBEDDED_FOLDER = Path(__file__).parent.parent / "embedded"
WEIGHTS = (".safetensors", ".bin", ".gguf")
FILES = (".safetensors", ".sft", ".gguf")
QUANTIZERS = ("bnb-4bit", "bnb-8bit", "int8", "fp8")
DTYPES = ("auto", "float32", "bfloat16", "float16")
PARTS_WITHOUT_WEIGHTS = ("tokenizer", "tokenizer_2", "scheduler")
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
MOST_WORDS = 200  # of a vocabulary that is shown whole


def locate(name: str) -> str:
    """A folder, a checkpoint file or a hub id for `name`; ValueError if a local one is missing or not whole."""
    if not name.strip():
        raise ValueError("--model is empty: name a folder, a file or a hub id, or leave it out for the embedded model")
    if name == EMBEDDED and not EMBEDDED_FOLDER.is_dir():
        raise ValueError("the embedded model is missing from this installation: install the package again")
    path = EMBEDDED_FOLDER if name == EMBEDDED else found(name)
    if path is None:
        if REPOSITORY.fullmatch(name) and Path(name).suffix not in FILES:
            return name
        raise ValueError(f"--model {name[:60]}: there is no such folder or file")
    if path.is_dir():
        check_folder(path)
    elif path.suffix not in FILES:
        raise ValueError(f"--model {name} must be a folder, or a file that ends in {' or '.join(FILES)}")
    return str(path)


def found(name: str, *folders: Path) -> Path | None:
    """The file or folder of that name, here or in `folders`; None if there is none."""
    for folder in (Path(), *folders):
        try:
            path = folder / Path(name).expanduser()
            if name and path.exists():
                return path
        except (OSError, RuntimeError, ValueError):  # a name too long, ~ of an unknown user, a name with a zero byte
            pass
    return None


def full(name: str) -> str:
    """A file's or folder's whole name, for processes that may work elsewhere; a hub id as it is."""
    path = found(name)
    return name if path is None else str(path.resolve())


def base_name(name: str) -> str:
    """A name without the folders around it: where a file lies on one machine tells another one nothing, and tells of
    its user. A hub id stays whole."""
    path = None if name == EMBEDDED else found(name)
    return name if path is None else path.resolve().name


def check_folder(folder: Path) -> None:
    """ValueError unless every part that model_index.json names is in the folder, with its weights."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{folder} is not a model folder: it has no model_index.json")
    for part, kind in read_index(index).items():
        if part.startswith("_") or not isinstance(kind, list):
            continue
        if len(kind) != 2:
            raise ValueError(f'"{part}" in {index} must be a library and a class, not {kind!r}')
        if kind[0] is None:
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
    count = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count(),
    }
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in count:  # torch knows more, such as meta, which nothing can be drawn on
        raise ValueError(f"--device {name[:60]} is unknown: take auto, cpu, cuda, cuda:1, mps or xpu")
    if (device.index or 0) >= count[device.type]:
        raise ValueError(f"--device {name} is not on this machine: leave --device out, or take cpu")
    return name


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """Words of the prompt that the tokenizer has no entry for, or makes nothing of, in order, each once."""
    if getattr(tokenizer, "unk_token_id", None) is None:
        return []
    marks = "".join(
        letter for letter in {*prompt} if unicodedata.category(letter)[0] in "PCZ"
    )  # dashes, quotes, blanks
    words = [word.strip(marks) for word in re.split(r"[\s!-/:-@[-`{-~]+", prompt.lower())]  # ASCII's punctuation parts

    def unknown(word: str) -> bool:
        ids = tokenizer(word, add_special_tokens=False).input_ids
        return not ids or tokenizer.unk_token_id in ids

    return [word for word in dict.fromkeys(words) if word and unknown(word)]


def cut_off(tokenizer: Any, prompt: str, limit: int) -> str:
    """The end of the prompt that does not fit into so many tokens; nothing if all of it does."""
    room = max(0, limit - tokenizer.num_special_tokens_to_add())
    fast = getattr(tokenizer, "is_fast", False)
    tokens = tokenizer(prompt, add_special_tokens=False, **({"return_offsets_mapping": True} if fast else {}))
    if len(tokens.input_ids) <= room:
        return ""
    return prompt[tokens.offset_mapping[room][0] :] if fast else tokenizer.decode(tokens.input_ids[room:])


def warnings_of(pipeline: Rolling, *texts: str) -> list[str]:
    """What the model will not read of its prompts: words that it does not know, and what is beyond its length."""
    said = []
    tokenizer, limit = pipeline.tokenizer, pipeline.card.max_sequence_length
    if tokenizer is None:
        return []
    unknown = unknown_words(tokenizer, " ".join(texts))
    if unknown:
        known = known_words(tokenizer)
        shown = f". It knows:\n{' '.join(known)}" if len(known) <= MOST_WORDS else ""
        said.append(f"this model does not know {', '.join(map(repr, unknown))}{shown}")
    for lost in (cut_off(tokenizer, text, limit).strip() for text in texts):
        if lost:
            said.append(f"this model reads {limit} tokens of a prompt, and not its end: {lost!r}")
    return said


def known_words(tokenizer: Any) -> list[str]:
    """The tokenizer's words, sorted, without its special tokens."""
    special = set(tokenizer.all_special_tokens)
    return sorted(w for w in tokenizer.get_vocab() if w not in special and w.isalpha())


def load(folder: str, device: str, dtype: str, **options: Any) -> Rolling:
    """The pipeline of a folder, a checkpoint file or a hub id, rolled and silent; `options` are `pipeline.load`'s."""
    quiet()
    import torch

    from ..loading import load as read
    from ..pipeline import roll

    with warnings.catch_warnings():
        # Releases of diffusers disagree about the name of dtype: all of them take torch_dtype, and the newest warn.
        warnings.simplefilter("ignore", FutureWarning)
        pipeline = read(folder, None if dtype == "auto" else getattr(torch, dtype), device, **options)
    pipeline.set_progress_bar_config(disable=True)
    return roll(pipeline)


def load_said(folder: str, said: Mapping[str, Any], start: str | None = None) -> Rolling:
    """The same, as the options of a model say it. start: what pictures start from, as `pipeline.load` names it."""
    files = [name for name, _ in said["lora"] or ()]
    twice = next((name for name in files if files.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"--lora {twice} is said twice: say it once, with the strength that it is to have")
    return load(
        folder,
        device_named(said["device"] or "auto"),
        said["dtype"] or "auto",
        variant=said["variant"],
        cpu_offload=said["cpu_offload"] or False,
        lora=dict(said["lora"] or ()),
        quantize=said["quantize"],
        start=start,
    )


def resolved(pipeline: Rolling, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that only a loaded model tells."""
    cfg = pipeline.card.cfg if settings["cfg"] is None else settings["cfg"]
    return {"dtype": str(pipeline.pipe.dtype).removeprefix("torch."), "cfg": cfg}


def lora(text: str) -> tuple[str, float]:
    """Type of --lora: a file, a folder or a hub id, and after = a strength, 1 if there is none."""
    name, mark, strength = text.rpartition("=")
    if not mark or found(text):  # a file may have = in its name
        name, strength = text, "1"
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not name.strip():
        raise argparse.ArgumentTypeError(f"takes NAME or NAME=STRENGTH, and {text!r} has no name")
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"takes NAME or NAME=STRENGTH, and {strength!r} is no number")
    return name, value


def quiet() -> None:
    """Keeps the libraries' own notes and bars off the terminal: what matters comes as an error."""
    for name in ("torchao", "torch.utils._pytree"):  # torchao's import says what it cannot speed up, even when unused
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
