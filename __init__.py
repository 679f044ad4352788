"""ComfyUI's entry: the static node mappings, and nothing else."""

from .rolling_diffusion.comfy.nodes import (
    AutoregressiveRollingDiffusionSampler,
    AutoregressiveRollingDiffusionSamplerAdvanced,
    FluxDevAutoRegressiveRollingDiffusionSampler,
    LoadEmbeddedRollingModel,
    RollingPlanPreview,
    RollingSampler,
)

NODE_CLASS_MAPPINGS = {
    "AutoregressiveRollingDiffusionSampler": AutoregressiveRollingDiffusionSampler,
    "AutoregressiveRollingDiffusionSamplerAdvanced": AutoregressiveRollingDiffusionSamplerAdvanced,
    "FluxDevAutoRegressiveRollingDiffusionSampler": FluxDevAutoRegressiveRollingDiffusionSampler,
    "RollingSampler": RollingSampler,
    "LoadEmbeddedRollingModel": LoadEmbeddedRollingModel,
    "RollingPlanPreview": RollingPlanPreview,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    # The page's search ranks by these names, in older pages by their first 30 letters: whoever looks for a KSampler is
    # to see ours.
    "AutoregressiveRollingDiffusionSampler": "Autoregressive Rolling Diffusion Sampler",
    "AutoregressiveRollingDiffusionSamplerAdvanced": "Autoregressive Rolling KSampler (Advanced)",
    "FluxDevAutoRegressiveRollingDiffusionSampler": "Flux-Dev Autoregressive Rolling Diffusion Sampler",
    "RollingSampler": "Rolling Sampler",
    "LoadEmbeddedRollingModel": "Load Embedded Rolling Model",
    "RollingPlanPreview": "Rolling Plan Preview",
}

WEB_DIRECTORY = "./web"
