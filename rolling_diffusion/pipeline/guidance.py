"""Guidance: what the one number cfg means for a model, and how two branches are joined.

FLUX.1-dev is guidance-distilled: it takes a guidance scale as an input. With an empty negative prompt cfg is that
input, and costs nothing. A negative prompt needs a second branch. Plain classifier-free guidance on top of the
distilled kind oversaturates, so the difference of the branches is projected and bounded (adaptive projected guidance,
Sadat et al. 2024): cfg scales it, and the embedded guidance stays at the model's own. An undistilled model gets plain
classifier-free guidance, against the empty prompt if there is no other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from diffusers.utils import logging

from ..defaults import Card

logger = logging.get_logger(__name__)


def decide(
    card: Card, parameters: Collection[str], said: Mapping[str, Any], cfg: float | None, distilled: bool
) -> tuple[bool, dict[str, Any]]:
    """Whether the answers to a prompt and its negative are joined by projection, not as the pipeline joins them; and
    what `cfg` comes to, as arguments of its call.

    parameters: names that the call takes. said: those that were given. distilled: whether guidance is an input of the
    model. guidance_scale and true_cfg_scale, when given, act as the pipeline has them; cfg is one number in their
    place.
    """
    scales = [name for name in ("guidance_scale", "true_cfg_scale") if said.get(name) is not None]
    if cfg is not None and scales:
        raise ValueError(
            f"cfg and {scales[0]} are given, and must not be both: cfg is one number in place of the other"
        )
    for name, value in [("cfg", cfg), *((name, said[name]) for name in scales)]:
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}, and must be a number of at least 0")
    negative = _says(said.get("negative_prompt")) or said.get("negative_prompt_embeds") is not None
    if cfg is None and not scales:
        cfg = card.cfg
    if "true_cfg_scale" not in parameters:
        if cfg is None:
            return False, {}
        if "guidance_scale" not in parameters:
            raise ValueError("cfg is given, but this pipeline takes no guidance: leave it out")
        return False, {"guidance_scale": cfg}
    if cfg is None:
        if negative and said.get("true_cfg_scale", 1) <= 1:
            logger.warning("The negative prompt has no effect unless cfg, or true_cfg_scale, is above 1.")
        return False, {}
    if not distilled:
        given = said.get("negative_prompt") is not None or negative
        return False, {"true_cfg_scale": cfg} | ({} if given else {"negative_prompt": ""})
    if not negative:
        return False, {"guidance_scale": cfg, "true_cfg_scale": 1.0}
    return cfg > 1, {"guidance_scale": card.guidance, "true_cfg_scale": cfg}


def _says(prompt: Any) -> bool:
    """Is it given, and not empty?"""
    return any(text.strip() for text in ([prompt] if isinstance(prompt, str) else prompt or ()))
