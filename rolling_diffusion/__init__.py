"""Autoregressive rolling diffusion: images that grow block by block, in an order you choose.

Names are imported when first used, so `import rolling_diffusion` costs nothing and needs neither diffusers nor ComfyUI.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers; at run time __getattr__ finds these
    from .core.memory import Memory
    from .core.order import ORDERS, Block, make_order, order
    from .core.plan import Cost, Plan, make_plan
    from .core.rollout import Denoiser, Frame, Moving, rollout
    from .core.rule import Rule
    from .defaults import Card, plan_for
    from .loading import load
    from .picture import plan_picture
    from .pipeline import Rolling, Strip, Tick, roll

__version__ = "0.1.0"

__all__ = [
    "ORDERS",
    "Block",
    "Card",
    "Cost",
    "Denoiser",
    "Frame",
    "Memory",
    "Moving",
    "Plan",
    "Rolling",
    "Rule",
    "Strip",
    "Tick",
    "__version__",
    "load",
    "make_order",
    "make_plan",
    "order",
    "plan_for",
    "plan_picture",
    "roll",
    "rollout",
]


def __getattr__(name: str) -> object:
    """A public name from its room (PEP 562), which is imported only now; AttributeError for any other.

    Plain imports, one per room: a reader, a linter and a scanner see what can be imported.
    """
    if name == "Memory":
        from .core import memory as room
    elif name in ("ORDERS", "Block", "make_order", "order"):
        from .core import order as room
    elif name in ("Cost", "Plan", "make_plan"):
        from .core import plan as room
    elif name in ("Denoiser", "Frame", "Moving", "rollout"):
        from .core import rollout as room
    elif name == "Rule":
        from .core import rule as room
    elif name in ("Card", "plan_for"):
        from . import defaults as room
    elif name == "plan_picture":
        from . import picture as room
    elif name == "load":
        from . import loading as room
    elif name in ("Rolling", "Strip", "Tick", "roll"):
        from . import pipeline as room
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(room, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
