"""Loading a pipeline from anything a user may have, with one sentence for everything that can go wrong."""

from __future__ import annotations

import errno
import inspect
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.utils import is_peft_available
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from .defaults import EMBEDDED, read_index
from .models.convert import flux_from_comfy, flux_to_comfy
from .pipeline.space import OutOfMemory

FLUX_DEV = "black-forest-labs/FLUX.1-dev"
EMBEDDED_FOLDER = Path(__file__).parent / EMBEDDED
FLUX_WIDTH = 3072
QUANTIZERS = ("gguf", "bnb-4bit", "bnb-8bit", "int8", "fp8")
SUFFIXES = (".safetensors", ".sft", ".gguf")
# Names that only Flux transformers have: in Black Forest Labs' files (with or without ComfyUI's prefix) and diffusers'.
FLUX_KEYS = re.compile(
    r"^(model\.diffusion_model\.)?double_blocks\.0\.img_mod\.lin\.|^transformer_blocks\.0\.norm1_context"
)
CLIP_KEYS = re.compile(r"^text_encoders\.clip_l\.|^conditioner\.embedders\.0\.")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
# Weights of a variant, such as model.fp16.safetensors or diffusion_pytorch_model.fp16-00001-of-00003.safetensors.
VARIANT = re.compile(r"(?:diffusion_pytorch_|pytorch_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)")
COMPUTED = ("position_ids", "inv_freq")  # what older releases of transformers stored, and newer ones compute


class Refused(ValueError):
    """What is wrong, as a sentence for the user: passed on as it is, where a library's words are explained."""


def load(
    model: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    cpu_offload: bool | str = False,
    lora: str | Path | Sequence[str | Path] | Mapping[str | Path, float] | None = None,
    quantize: str | None = None,
    parts: str | Path = FLUX_DEV,
    variant: str | None = None,
    start: str | None = None,
    **components: Any,
) -> Any:
    """A pipeline on its device. ValueError, of one sentence, for what is wrong; torch.OutOfMemoryError if it won't fit.

    Weights that are missing, that the model has no place for, or that are not finite are wrong too: the libraries draw
    with them, only warning, or not even that.

    model: "embedded" for that which ships here, a folder, a repository, or a .safetensors or .gguf file; what a file
        lacks (text encoders, VAE) comes from `parts`, a folder or repository, or from `components`, as FluxPipeline
        names them.
    dtype: bfloat16 on a GPU, float32 elsewhere. device: a GPU if there is one. cpu_offload: True or "model" keeps on
        the GPU the part of the model that is at work, "sequential" the layer at work (least memory, slow).
    lora: a file, a folder or a repository, some of them, or some with strengths.
    quantize: "bnb-4bit", "bnb-8bit" (bitsandbytes), "int8", "fp8" (torchao), for the transformer and T5; a .gguf file
        is quantised already. variant: of the weights, such as "fp16", where a folder or repository has several.
    start: "image" or "mask" for the pipeline around the same model that starts from a picture, or paints in a mask.
    """
    source = _path(model := EMBEDDED_FOLDER if model == EMBEDDED else model)
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
            pipe = _from_file(source, dtype, quantize, str(parts), variant, components)
        else:
            pipe = _from_folder(str(model), dtype, quantize, variant, components)
        _check(pipe, str(model))
    for number, name in enumerate(loras):
        with plainly(f"the LoRA {name}"):
            _add_lora(pipe, name, f"lora{number}")
    if loras:
        pipe.set_adapters([f"lora{i}" for i in range(len(loras))], list(loras.values()))
    with plainly(str(model)):
        pipe = starting(pipe, start)
        if cpu_offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=target)
        elif cpu_offload:
            pipe.enable_model_cpu_offload(device=target)
        else:
            pipe.to(target)
    return pipe


def starting(pipe: Any, start: str | None) -> Any:
    """The pipeline around the same parts that takes a picture, or a picture and a mask; ValueError if there is none."""
    wanted = {None: (), "image": ("image",), "mask": ("image", "mask_image")}[start]
    takes = inspect.signature(type(pipe).__call__).parameters
    if all(name in takes for name in wanted):
        return pipe
    kind = diffusers.AutoPipelineForImage2Image if start == "image" else diffusers.AutoPipelineForInpainting
    try:
        return kind.from_pipe(pipe)
    except ValueError:
        what = "start from a picture" if start == "image" else "paint in a mask"
        raise Refused(f"{type(pipe).__name__} has no sibling that could {what}: leave the picture out") from None


def _path(name: str | Path) -> Path:
    """The path that a user means; ValueError if it cannot be one."""
    shown = repr(str(name)[:60])
    if not str(name).strip():
        raise Refused(f"{shown} is no name of a file, a folder or a repository")
    try:
        path = Path(name).expanduser()
        path.exists()  # a name that is too long for the file system fails here
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        raise Refused(f"{shown} is no name of a file or folder: {getattr(error, 'strerror', error)}") from None
    return path


def _from_folder(model: str, dtype: torch.dtype, quantize: str | None, variant: str | None, components: dict) -> Any:
    """A pipeline of a folder or a repository, with `components` in place of the parts of those names."""
    folder = _path(model)
    if not (folder.is_dir() or REPOSITORY.fullmatch(model)):
        raise Refused(f"there is no folder or file {model}, and it does not name a repository either")
    if not folder.is_dir():
        folder = Path(diffusers.DiffusionPipeline.download(model, variant=variant, **components))
    models = {
        part: kind
        for part, (library, name) in _index(folder).items()
        if part not in components and issubclass(kind := getattr(LIBRARIES.get(library), str(name), object), nn.Module)
    }
    variants = {
        part: {found[1] for file in (folder / part).glob("*") if (found := VARIANT.fullmatch(file.name))}
        for part in models
    }
    named = set().union(*variants.values()) - {None}
    if variant is not None and variant not in named:
        raise Refused(f"{model} has no variant {variant}: it has {', '.join(sorted(named)) or 'none'}")
    parts = {}
    for part, kind in models.items():
        mine = variant if variant in variants[part] else None
        if variants[part] and mine not in variants[part]:
            raise Refused(
                f"{part} in {model} has weights of a variant only, {', '.join(sorted(variants[part]))}: name it"
            )
        quantizer = None
        if quantize and part in ("transformer", "text_encoder_2"):  # they hold nearly all of the weights
            library = diffusers if issubclass(kind, diffusers.ModelMixin) else transformers
            quantizer = _model_quantizer(quantize, dtype, library)
        parts[part] = _part(folder / part, kind, dtype, quantizer, mine)
    return diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **parts, **components)


def _index(folder: Path) -> dict[str, list[Any]]:
    """The parts that a folder's model_index.json names: library and class of each."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise Refused(f"{folder} is not a model folder: it has no model_index.json")
    try:
        index = read_index(path)
    except ValueError as error:
        raise Refused(str(error)) from None
    parts = {name: kind for name, kind in index.items() if isinstance(kind, list) and not name.startswith("_")}
    for name, kind in parts.items():
        if len(kind) != 2 or not all(isinstance(word, (str, type(None))) for word in kind):
            raise Refused(f'"{name}" in {path} must be a library and a class, not {kind!r}')
    return parts


def _part(folder: Path, kind: Any, dtype: torch.dtype, quantizer: Any, variant: str | None) -> Any:
    """One model of a folder, with every weight that it needs, and no layer that it has no place for."""
    settings = {"quantization_config": quantizer} if quantizer else {}
    if not folder.is_dir():
        raise Refused(f"{folder.parent} is not whole: it has no {folder.name} folder, which its model_index.json names")
    module, about = kind.from_pretrained(
        str(folder), torch_dtype=dtype, variant=variant, output_loading_info=True, **settings
    )
    if about["missing_keys"]:
        raise Refused(f"{folder.name} in {folder.parent} lacks {_some(about['missing_keys'])}: get its weights again")
    # Whole other models beside it, such as the picture half of CLIP, do no harm; layers that it does not count do.
    # What quantised weights are stored with has names of its own.
    roots = {name for name, _ in module.named_children()}
    foreign = [n for n in about["unexpected_keys"] if n.partition(".")[0] in roots and not n.endswith(COMPUTED)]
    if foreign and not getattr(module.config, "quantization_config", None):
        raise Refused(
            f"{folder.name} in {folder.parent} has weights that its config.json has no place for: {_some(foreign)}"
        )
    return module


def _some(names: Any) -> str:
    """The first of some names, and how many more there are."""
    first, *rest = sorted(names)
    return f"{first} and {len(rest)} more" if rest else first


def _check(pipe: Any, model: str) -> None:
    """Refused unless every weight is there and finite, and positions fill a head of the transformer."""
    for part, module in pipe.components.items():
        if not isinstance(module, nn.Module):
            continue
        for name, weight in (*module.named_parameters(), *module.named_buffers()):
            if weight.is_meta:
                raise Refused(f"{part} of {model} lacks {name}: get its weights again")
            plain = type(weight) in (torch.Tensor, nn.Parameter)  # else quantised
            if plain and weight.is_floating_point() and weight.numel():
                if weight.dtype.itemsize == 1:
                    continue  # 8-bit floats know no minimum
                if not all(bound.isfinite() for bound in weight.detach().aminmax()):
                    raise Refused(f"{part} of {model} has {name} that is not finite: get its weights again")
    config = getattr(pipe.components.get("transformer"), "config", {})
    axes, width = config.get("axes_dims_rope"), config.get("attention_head_dim")
    if "axes_dims_rope" in config and not (
        isinstance(axes, (list, tuple))
        and all(isinstance(n, int) and n > 0 and n % 2 == 0 for n in axes)
        and sum(axes) == width
    ):
        raise Refused(
            f"transformer of {model} has axes_dims_rope = {axes!r}, and must have even numbers that add up to {width}"
        )


def _from_file(
    source: Path, dtype: torch.dtype, quantize: str | None, parts: str, variant: str | None, components: dict
) -> Any:
    """A checkpoint in one file: the transformer, perhaps with what belongs to it."""
    if source.suffix not in SUFFIXES:
        raise Refused(f"{source} must be a folder, or a file that ends in {', '.join(SUFFIXES)}")
    settings: dict[str, Any] = {"torch_dtype": dtype}
    names, whole = [], False
    if source.suffix == ".gguf":
        if quantize not in (None, "gguf"):
            raise Refused(f"{source} is quantised already: leave {quantize} out")
        with source.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise Refused(f"{source} cannot be read: it is damaged, or not a GGUF file")
        settings["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
    else:
        names = _keys(source)
        if not any(FLUX_KEYS.match(name) for name in names):
            raise Refused(f"{source} is not a Flux checkpoint: it has none of a Flux transformer's weights")
        whole = any(CLIP_KEYS.match(name) for name in names)
        if quantize:
            settings["quantization_config"] = _model_quantizer(quantize, dtype, diffusers)
    if whole and "quantization_config" not in settings:
        return diffusers.FluxPipeline.from_single_file(str(source), torch_dtype=dtype, config=parts, **components)
    beside = f"{parts}, which holds what {source.name} lacks,"
    with plainly(beside):
        config: Any = diffusers.FluxTransformer2DModel.load_config(parts, subfolder="transformer")
    if source.suffix != ".gguf":
        _check_names(source, names, config)
    if source.suffix != ".gguf" and "quantization_config" not in settings and _width(source) not in (None, FLUX_WIDTH):
        transformer = _small_transformer(source, config, dtype)
    else:
        transformer = diffusers.FluxTransformer2DModel.from_single_file(
            str(source), config=parts, subfolder="transformer", **settings
        )
    with plainly(beside):
        return _from_folder(parts, dtype, None, variant, {**components, "transformer": transformer})


def _keys(source: Path) -> list[str]:
    try:
        with safe_open(source, "pt") as file:
            return list(file.keys())
    except SafetensorError:
        raise Refused(f"{source} cannot be read: it is damaged, or not a safetensors file") from None


def _width(source: Path) -> int | None:
    """Width of a transformer in Black Forest Labs' names; None for diffusers' names."""
    with safe_open(source, "pt") as file:
        for name in list(file.keys()):
            if name.endswith("img_in.weight"):
                return file.get_slice(name).get_shape()[0]
    return None


def _check_names(source: Path, names: Sequence[str], config: Any) -> None:
    """Refused unless the file has every weight of the transformer, in diffusers' or in Black Forest Labs' names."""
    with torch.device("meta"):
        model: Any = diffusers.FluxTransformer2DModel.from_config(config)
    expected = model.state_dict()
    if not any(name.startswith("transformer_blocks.") for name in names):
        expected = flux_to_comfy(expected)
    missing = expected.keys() - {name.removeprefix("model.diffusion_model.") for name in names}
    if missing:
        raise Refused(f"{source} lacks {_some(missing)}: get its weights again")


def _small_transformer(source: Path, config: Any, dtype: torch.dtype) -> Any:
    """A transformer of another width than FLUX.1's: diffusers converts that width only."""
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
    raise Refused(f"quantize is {name!r}, and must be one of {', '.join(QUANTIZERS)}; gguf is for .gguf files")


def _add_lora(pipe: Any, name: str | Path, adapter: str) -> None:
    path = _path(name)
    alien = f"{name} is not a LoRA for Flux: it has no weights that fit this transformer"
    if path.is_file() and not any("lora" in key.lower() for key in _keys(path)):
        raise Refused(alien)
    before = set(_adapters(pipe))
    if path.is_file():
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=adapter)
    elif path.is_dir():
        if not any(file.suffix in SUFFIXES for file in path.iterdir()):
            raise Refused(f"{name} is not a LoRA: the folder holds no .safetensors file")
        pipe.load_lora_weights(str(path), adapter_name=adapter)
    elif REPOSITORY.fullmatch(str(name)):
        pipe.load_lora_weights(str(name), adapter_name=adapter)
    else:
        raise Refused(f"there is no LoRA file {name}")
    if set(_adapters(pipe)) == before:
        raise Refused(alien)


def _adapters(pipe: Any) -> list[str]:
    return sorted({name for names in pipe.get_list_adapters().values() for name in names})


@contextmanager
def plainly(what: str) -> Iterator[None]:
    """Turns what the libraries raise into a ValueError of one sentence; out of memory stays what it is."""
    try:
        yield
    except OutOfMemory:
        sentence = None
    except Refused:
        raise
    except Exception as error:
        sentence = explain(error, what)
    else:
        return
    if sentence is None:  # raised here, where no frame holds what was loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemory(
            f"Out of memory while loading {what}: cpu_offload, quantize, or dtype=torch.bfloat16 need less."
        )
    raise Refused(sentence)


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
    readable = transformers.utils.is_sentencepiece_available() and transformers.utils.is_protobuf_available()
    if not readable and re.search("tiktoken|sentencepiece|protobuf", text, re.I):  # transformers guesses among them
        return (
            f"{what} has a tokenizer without a tokenizer.json, and the packages that read it are not installed: "
            "pip install sentencepiece protobuf"
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
