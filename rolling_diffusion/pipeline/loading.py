"""Loading a pipeline from anything a user may have, with one sentence for everything that can go wrong."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import is_peft_available
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..models.convert import flux_from_comfy
from .space import OutOfMemory

FLUX_DEV = "black-forest-labs/FLUX.1-dev"
FLUX_WIDTH = 3072
QUANTIZERS = ("gguf", "bnb-4bit", "bnb-8bit", "int8", "fp8")
SUFFIXES = (".safetensors", ".sft", ".gguf")
# Names that only Flux transformers have: in Black Forest Labs' files (with or without ComfyUI's prefix) and diffusers'.
FLUX_KEYS = re.compile(
    r"^(model\.diffusion_model\.)?double_blocks\.0\.img_mod\.lin\.|^transformer_blocks\.0\.norm1_context"
)
CLIP_KEYS = re.compile(r"^text_encoders\.clip_l\.|^conditioner\.embedders\.0\.")


def load(
    model: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    cpu_offload: bool | str = False,
    lora: str | Path | Sequence[str | Path] | Mapping[str | Path, float] | None = None,
    quantize: str | None = None,
    parts: str | Path = FLUX_DEV,
    **components: Any,
) -> Any:
    """A pipeline on its device. ValueError, of one sentence, for what is wrong; torch.OutOfMemoryError if it won't fit.

    model: a folder, a repository, or a .safetensors or .gguf file; what a file lacks (text encoders, VAE) comes from
        `parts`, a folder or repository, or from `components`, as FluxPipeline names them.
    dtype: bfloat16 on a GPU, float32 elsewhere. device: a GPU if there is one. cpu_offload: True or "model" keeps on
        the GPU the part of the model that is at work, "sequential" the layer at work (least memory, slow).
    lora: a file, a folder or a repository, some of them, or some with strengths.
    quantize: "bnb-4bit", "bnb-8bit" (bitsandbytes), "int8", "fp8" (torchao), for the transformer and T5; a .gguf file
        is quantised already.
    """
    source = Path(model).expanduser()
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32)
    if cpu_offload not in (False, True, "model", "sequential"):
        raise ValueError(f'cpu_offload is {cpu_offload!r}, and must be False, True, "model" or "sequential"')
    if cpu_offload and target.type == "cpu":
        raise ValueError(
            "cpu_offload moves parts of the model to a GPU and back, but the device is the CPU: leave it out"
        )
    names = [lora] if isinstance(lora, (str, Path)) else lora or ()
    loras = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    if loras and not is_peft_available():
        raise ValueError("LoRAs need the peft package: pip install peft")
    with plainly(str(model)):
        if source.is_file():
            pipe = _from_file(source, dtype, quantize, str(parts), components)
        else:
            pipe = _from_folder(model, source, dtype, quantize, components)
    for number, name in enumerate(loras):
        with plainly(f"the LoRA {name}"):
            _add_lora(pipe, name, f"lora{number}")
    if loras:
        pipe.set_adapters([f"lora{i}" for i in range(len(loras))], list(loras.values()))
    with plainly(str(model)):
        if cpu_offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=target)
        elif cpu_offload:
            pipe.enable_model_cpu_offload(device=target)
        else:
            pipe.to(target)
    return pipe


def _from_folder(model: str | Path, source: Path, dtype: torch.dtype, quantize: str | None, components: dict) -> Any:
    name = str(source) if source.is_dir() else str(model)
    if source.is_dir() and not (source / "model_index.json").is_file():
        raise ValueError(f"{source} is not a model folder: it has no model_index.json")
    if not source.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"there is no folder or file {model}, and it does not name a repository either")
    settings = {"quantization_config": _pipeline_quantizer(quantize, dtype)} if quantize else {}
    return diffusers.DiffusionPipeline.from_pretrained(name, torch_dtype=dtype, **settings, **components)


def _from_file(source: Path, dtype: torch.dtype, quantize: str | None, parts: str, components: dict) -> Any:
    """A checkpoint in one file: the transformer, perhaps with what belongs to it."""
    if source.suffix not in SUFFIXES:
        raise ValueError(f"{source} must be a folder, or a file that ends in {', '.join(SUFFIXES)}")
    settings: dict[str, Any] = {"torch_dtype": dtype}
    whole = False
    if source.suffix == ".gguf":
        if quantize not in (None, "gguf"):
            raise ValueError(f"{source} is quantised already: leave {quantize} out")
        settings["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
    else:
        names = _keys(source)
        if not any(FLUX_KEYS.match(name) for name in names):
            raise ValueError(f"{source} is not a Flux checkpoint: it has none of a Flux transformer's weights")
        whole = any(CLIP_KEYS.match(name) for name in names)
        if quantize:
            settings["quantization_config"] = _model_quantizer(quantize, dtype, diffusers)
    local = {"config": parts} if whole or parts else {}
    if whole and "quantization_config" not in settings:
        return diffusers.FluxPipeline.from_single_file(str(source), torch_dtype=dtype, **local, **components)
    with plainly(f"{parts}, which holds what {source.name} lacks,"):
        return _beside(source, parts, dtype, settings, components)


def _beside(source: Path, parts: str, dtype: torch.dtype, settings: dict[str, Any], components: dict) -> Any:
    """A transformer in one file, with all else from the folder or repository `parts`."""
    if source.suffix != ".gguf" and "quantization_config" not in settings and _width(source) not in (None, FLUX_WIDTH):
        transformer = _small_transformer(source, parts, dtype)
    else:
        transformer = diffusers.FluxTransformer2DModel.from_single_file(
            str(source), config=parts, subfolder="transformer", **settings
        )
    return diffusers.FluxPipeline.from_pretrained(parts, transformer=transformer, torch_dtype=dtype, **components)


def _keys(source: Path) -> list[str]:
    try:
        with safe_open(source, "pt") as file:
            return list(file.keys())
    except SafetensorError:
        raise ValueError(f"{source} cannot be read: it is damaged, or not a safetensors file") from None


def _width(source: Path) -> int | None:
    """Width of a transformer in Black Forest Labs' names; None for diffusers' names."""
    with safe_open(source, "pt") as file:
        for name in list(file.keys()):
            if name.endswith("img_in.weight"):
                return file.get_slice(name).get_shape()[0]
    return None


def _small_transformer(source: Path, parts: str, dtype: torch.dtype) -> diffusers.FluxTransformer2DModel:
    """A transformer of another width than FLUX.1's: diffusers converts that width only."""
    config: Any = diffusers.FluxTransformer2DModel.load_config(parts, subfolder="transformer")
    transformer: Any = diffusers.FluxTransformer2DModel.from_config(config)
    transformer.load_state_dict(flux_from_comfy(load_file(source)))
    return transformer.to(dtype).eval()


def _model_quantizer(name: str, dtype: torch.dtype, library: Any) -> Any:
    """The configuration of a quantiser for one model of `library`, diffusers or transformers."""
    if name.startswith("bnb-"):
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return library.BitsAndBytesConfig(**(bits if name == "bnb-4bit" else {"load_in_8bit": True}))
    if name in ("int8", "fp8"):
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Float8WeightOnlyConfig,
            Int8WeightOnlyConfig,
        )

        return library.TorchAoConfig(Int8WeightOnlyConfig() if name == "int8" else Float8WeightOnlyConfig())
    raise ValueError(f"quantize is {name!r}, and must be one of {', '.join(QUANTIZERS)}; gguf is for .gguf files")


def _pipeline_quantizer(name: str, dtype: torch.dtype) -> Any:
    """The transformer and T5, which hold nearly all of the weights."""
    import transformers

    mapping = {
        "transformer": _model_quantizer(name, dtype, diffusers),
        "text_encoder_2": _model_quantizer(name, dtype, transformers),
    }
    return diffusers.PipelineQuantizationConfig(quant_mapping=mapping)


def _add_lora(pipe: Any, name: str | Path, adapter: str) -> None:
    path = Path(name).expanduser()
    alien = f"{name} is not a LoRA for Flux: it has no weights that fit this transformer"
    if path.is_file() and not any("lora" in key.lower() for key in _keys(path)):
        raise ValueError(alien)
    before = set(_adapters(pipe))
    if path.is_file():
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=adapter)
    elif path.is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        pipe.load_lora_weights(str(name), adapter_name=adapter)
    else:
        raise ValueError(f"there is no LoRA file {name}")
    if set(_adapters(pipe)) == before:
        raise ValueError(alien)


def _adapters(pipe: Any) -> list[str]:
    return sorted({name for names in pipe.get_list_adapters().values() for name in names})


@contextmanager
def plainly(what: str) -> Iterator[None]:
    """Turns what the libraries raise into a ValueError of one sentence; out of memory stays what it is."""
    try:
        yield
    except OutOfMemory:
        sentence = None
    except Exception as error:
        if isinstance(error, ValueError) and "\n" not in str(error) and not isinstance(error, OSError):
            raise  # a sentence already, ours or the libraries'
        sentence = explain(error, what)
    else:
        return
    if sentence is None:  # raised here, where no frame holds what was loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemory(
            f"Out of memory while loading {what}: cpu_offload, quantize, or dtype=torch.bfloat16 need less."
        )
    raise ValueError(sentence)


def explain(error: BaseException, what: str) -> str:
    """One sentence for an error, or for the error behind it."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    text = " ".join(str(link) for link in chain)
    if "GatedRepoError" in kinds or "gated repo" in text or "awaiting a review" in text:
        return f"{what} is gated: accept its licence on https://huggingface.co/{what}, then log in with `hf auth login`"
    if any(isinstance(link, OSError) and link.errno == errno.ENOSPC for link in chain) or "No space left" in text:
        free = shutil.disk_usage(Path.home()).free / 2**30
        return (
            f"There is not enough disk for {what}: {free:.0f} GiB are free at {Path.home()}, and FLUX.1-dev needs "
            "about 34 GiB; free some, or set HF_HOME to a larger disk"
        )
    if "RepositoryNotFoundError" in kinds or "is not a valid model identifier" in text:
        return f"There is no repository {what} that you may read: check the name, or log in with `hf auth login`"
    if kinds & {"OfflineModeIsEnabled", "ConnectionError", "ConnectError", "LocalEntryNotFoundError", "ConnectTimeout"}:
        return (
            f"{what} is not on this machine and could not be downloaded: check the network (and that HF_HUB_OFFLINE is "
            "not set), or give a local folder or file"
        )
    if any(isinstance(link, ImportError) for link in chain):
        found = re.search(r"pip install[\w .,=>\[\]\"'-]*|No module named '(\w+)", text)
        advice = f"pip install {found[1]}" if found and found[1] else found[0].strip() if found else str(error)
        return f"{what} needs a package that is not installed: {advice}"
    if isinstance(error, (OSError, SafetensorError)) or "Error no file named" in text or "incomplete metadata" in text:
        return f"{what} is not whole: {_first_sentence(error)}"
    return f"{what} cannot be loaded: {_first_sentence(error)}"


def _first_sentence(error: BaseException) -> str:
    lines = " ".join(str(error).split())
    return re.split(r"(?<=[a-z\])'\"])\. ", lines)[0].rstrip(".")[:300] or type(error).__name__
