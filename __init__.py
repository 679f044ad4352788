"""ComfyUI's entry: the static node mappings, and nothing else."""

from .rolling_diffusion.comfy.extend import RollingExtend
from .rolling_diffusion.comfy.nodes import (
    AutoregressiveRollingDiffusionSampler,
    AutoregressiveRollingDiffusionSamplerAdvanced,
    FluxDevAutoRegressiveRollingDiffusionSampler,
    LoadEmbeddedRollingModel,
    RollingPlanPreview,
    RollingSampler,
)
from .rolling_diffusion.comfy.prompts import RollingPrompts
from .rolling_diffusion.comfy.stream import RollingStream

NODE_CLASS_MAPPINGS = {
    "AutoregressiveRollingDiffusionSampler": AutoregressiveRollingDiffusionSampler,
    "AutoregressiveRollingDiffusionSamplerAdvanced": AutoregressiveRollingDiffusionSamplerAdvanced,
    "FluxDevAutoRegressiveRollingDiffusionSampler": FluxDevAutoRegressiveRollingDiffusionSampler,
    "RollingSampler": RollingSampler,
    "LoadEmbeddedRollingModel": LoadEmbeddedRollingModel,
    "RollingPlanPreview": RollingPlanPreview,
    "RollingStream": RollingStream,
    "RollingExtend": RollingExtend,
    "RollingPrompts": RollingPrompts,
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
    "RollingStream": "Rolling Stream",
    "RollingExtend": "Rolling Extend",
    "RollingPrompts": "Rolling Prompts",
}

WEB_DIRECTORY = "./web"
