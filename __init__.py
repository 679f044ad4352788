"""ComfyUI's entry: the static node mappings, and nothing else."""

from .rolling_diffusion.comfy.nodes import (
    AutoregressiveRollingDiffusionSampler,
    FluxDevAutoRegressiveRollingDiffusionSampler,
    LoadEmbeddedRollingModel,
    RollingPlanPreview,
    RollingSampler,
)

NODE_CLASS_MAPPINGS = {
    "AutoregressiveRollingDiffusionSampler": AutoregressiveRollingDiffusionSampler,
    "FluxDevAutoRegressiveRollingDiffusionSampler": FluxDevAutoRegressiveRollingDiffusionSampler,
    "RollingSampler": RollingSampler,
    "LoadEmbeddedRollingModel": LoadEmbeddedRollingModel,
    "RollingPlanPreview": RollingPlanPreview,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "AutoregressiveRollingDiffusionSampler": "Autoregressive Rolling Diffusion Sampler",
    "FluxDevAutoRegressiveRollingDiffusionSampler": "Flux-Dev Autoregressive Rolling Diffusion Sampler",
    "RollingSampler": "Rolling Sampler",
    "LoadEmbeddedRollingModel": "Load Embedded Rolling Model",
    "RollingPlanPreview": "Rolling Plan Preview",
}

WEB_DIRECTORY = "./web"
