"""Flux with a noise level per block and with memory, on diffusers' own modules.

Names are imported when first used, so that `models.convert` needs no diffusers.
"""

__all__ = ["FluxDenoiser", "RollingFluxTransformer2DModel"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    """A public name from its module (PEP 562); AttributeError for any other."""
    if name == "FluxDenoiser":
        from .denoiser import FluxDenoiser

        return FluxDenoiser
    if name == "RollingFluxTransformer2DModel":
        from .flux import RollingFluxTransformer2DModel

        return RollingFluxTransformer2DModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
