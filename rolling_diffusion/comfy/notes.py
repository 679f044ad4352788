"""What a run tells its user: in the log, and on the node that runs, where the page shows texts on nodes."""

from __future__ import annotations

import logging
import sys
from typing import Any

from comfy_execution.utils import get_executing_context

log = logging.getLogger("rolling_diffusion")


class Notes:
    """The sentences of one run, each told once."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def tell(self, sentence: str, level: int = logging.INFO) -> None:
        if sentence in self.told:
            return
        self.told.append(sentence)
        log.log(level, "Rolling: %s", sentence)
        running = get_executing_context()
        server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        if running is not None and server is not None:  # neither is there in a script that uses ComfyUI's modules
            server.send_progress_text("\n".join(self.told), running.node_id)

    def warn(self, sentence: str) -> None:
        self.tell(sentence, logging.WARNING)


# Guidance that measures the whole canvas, by the names of ComfyUI's own functions for it.
MEASURES = ("rescale_cfg", "mahiro", "cfg_zero_star", "cfg_norm", "renorm_cfg", "APG.", "tangential_damping", "SelfAtt")


def doubts(options: dict, guider: Any, windows: bool) -> list[str]:
    """One sentence for each thing on this model that changes results when blocks roll."""
    out = []
    transformer = options.get("transformer_options", {})
    names = [*transformer, *(key for keys in transformer.get("wrappers", {}).values() for key in keys if key)]
    names += [_full_name(options.get("model_function_wrapper"))]
    caches = [name for name in names if "cache" in name.lower() or name == "rel_l1_thresh"]
    if caches:
        out.append(
            f"A step cache ({caches[0]}) reuses answers that belong to other blocks: the picture differs from one "
            "without it. Take it off to be exact."
        )
    functions = [options.get("sampler_cfg_function"), *options.get("sampler_pre_cfg_function", []),
                 *options.get("sampler_post_cfg_function", [])]  # fmt: skip
    for name in map(_full_name, functions):
        if any(each in name for each in MEASURES):
            out.append(f"{name.split('.')[0]} measures the whole canvas, blocks that rest included.")
    conditions = [cond for group in (getattr(guider, "conds", None) or {}).values() for cond in group or ()]
    if windows and any("reference_latents" in cond for cond in conditions):
        out.append("Each window sees the whole reference picture, not the part that it draws.")
    return out


def _full_name(function: Any) -> str:
    owner = getattr(function, "__self__", function)
    return getattr(function, "__qualname__", type(owner).__qualname__) if function is not None else ""
