"""Space: where memory is kept, and what to say when there is none left."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled

from ..core.plan import Plan
from ..models.shares import degree

OutOfMemory: Any = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
NONE_LEFT = "Out of memory: a smaller canvas needs less."
SPARE = 2 * 2**30  # bytes, for the activations of a call


def ran_out(error: BaseException) -> bool:
    """Whether an error is that memory ran out: torch's allocator of main memory has none of its own."""
    return isinstance(error, (MemoryError, OutOfMemory)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def memory_bytes(transformer: Any, tokens: int, batch: int, dtype: torch.dtype) -> int:
    """What so many tokens of memory take: a key and a value per layer; FLUX.1-dev: 0.70 MB a token in bfloat16.

    Of processes that share a transformer, each has its own heads' part."""
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    # SD 3 has no single blocks; in 3.5 some blocks attend twice.
    layers = config.num_layers + config.get("num_single_layers", 0) + len(config.get("dual_attention_layers", ()))
    return 2 * tokens * layers * width * batch * torch.finfo(dtype).bits // 8 // degree(transformer)


def place_memory(
    transformer: Any,
    offloaded: bool,
    plan: Plan,
    cap: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.device | None:
    """None to keep memory where it is computed; the CPU if it won't fit, or if the model itself lies there."""
    if device.type != "cuda" or plan.alone:
        return None
    hooked = offloaded or any(hasattr(module, "_hf_hook") for module in transformer.modules())
    if hooked or _is_group_offload_enabled(transformer):
        return torch.device("cpu")
    need = memory_bytes(transformer, min(cap, plan.height * plan.width // plan.multiple**2), batch, dtype)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached
    # Joining the blocks' parts holds a layer twice.
    return None if 1.2 * need + SPARE < free else torch.device("cpu")


def out_of_memory(plan: Plan, kept_at: torch.device | str) -> Exception:
    """What was tried, and what needs less. The allocator's cache is handed back."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    where = "the CPU" if torch.device(kept_at).type == "cpu" else "the GPU"
    return OutOfMemory(
        f"Out of memory on a canvas of {plan.height} × {plan.width} cells with a window of {plan.window} and memory on "
        f'{where}: a smaller window, draft=0, memory_device="cpu", a lower memory_tokens or attention_persistence, '
        "enable_model_cpu_offload() or vae.enable_tiling() need less."
    )
