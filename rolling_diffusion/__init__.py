"""Autoregressive rolling diffusion: images that grow block by block, in an order you choose.

Names are imported when first used, so `import rolling_diffusion` costs nothing and needs neither diffusers nor ComfyUI.
"""

__version__ = "0.1.0"

# Where each public name lives. A name asked for here is looked up in its room, and only that room is imported.
_HOMES = {
    "ORDERS": "core.order",
    "Block": "core.order",
    "make_order": "core.order",
    "Cost": "core.plan",
    "Plan": "core.plan",
    "make_plan": "core.plan",
    "sigmas": "core.sigmas",
    "Denoiser": "core.rollout",
    "Frame": "core.rollout",
    "Moving": "core.rollout",
    "rollout": "core.rollout",
    "Memory": "core.memory",
    "plan_picture": "picture",
    "RollingFluxTransformer2DModel": "models.flux",
    "FluxDenoiser": "models.denoiser",
    "RollingFluxPipeline": "pipeline",
}

__all__ = ["__version__", *sorted(_HOMES)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    """A public name from its room (PEP 562); AttributeError for any other."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_room(home), name)


def _room(home: str) -> object:
    # Plain imports, one per room: a reader, a linter and a scanner see what can be imported.
    if home == "core.order":
        from .core import order as room
    elif home == "core.plan":
        from .core import plan as room
    elif home == "core.sigmas":
        from .core import sigmas as room
    elif home == "core.rollout":
        from .core import rollout as room
    elif home == "core.memory":
        from .core import memory as room
    elif home == "picture":
        from . import picture as room
    elif home == "models.flux":
        from .models import flux as room
    elif home == "models.denoiser":
        from .models import denoiser as room
    else:
        from . import pipeline as room
    return room


def __dir__() -> list[str]:
    return sorted(globals() | _HOMES.keys())
