"""One call on several processes, by Ulysses: each holds some of the tokens, and in attention all tokens of some heads.

diffusers' hooks (`enable_parallelism`) cut text and image into shares where the transformer begins, and join them where
it ends. What lies between is ours in a rolling call: noise levels are cut like the tokens that have them, and memory is
stored and seen where a process has all tokens of its own heads, so that each keeps its heads' memory alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def degree(model: Any) -> int:
    """How many processes share the model's calls by Ulysses; 1 without."""
    config = _config(model)
    return 1 if config is None else config.ulysses_degree


def refusal(model: Any) -> str | None:
    """Why a model that runs on several devices cannot roll there, in one sentence; None if it can."""
    if getattr(model, "_parallel_config", None) is None:
        return None
    config, name = _config(model), type(model).__name__
    if getattr(model, "_cp_plan", None) is None:
        return f"diffusers has no plan of how {name} is shared out over several devices: run it on one"
    if config is None or config.ring_degree > 1:
        return (
            "the transformer is shared out over several devices in a way that memory does not know: take Ulysses, "
            "ContextParallelConfig(ulysses_degree=…, ulysses_anything=True), or roll with lag=0"
        )
    heads, count = model.config.num_attention_heads, config.ulysses_degree
    if heads % count:
        return f"{name} has {heads} attention heads, which {count} processes cannot share evenly: take a divisor of it"
    return None


def _config(model: Any) -> Any:
    return getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)


class Shares:
    """How a call's tokens, of text and then of the image, are shared out, as diffusers' hooks do it."""

    def __init__(self, group: Any, text: int, image: int, refs: int):
        self.group, self.count, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        for what, tokens in (("the text has", text), ("blocks in motion have", image)):
            if tokens < self.count:
                raise ValueError(f"{what} {tokens} tokens, and {self.count} processes share them: take fewer processes")
        self.texts, self.images = (
            [len(part) for part in torch.arange(tokens).tensor_split(self.count)] for tokens in (text, image)
        )
        self.sizes = [a + b for a, b in zip(self.texts, self.images)]  # tokens of each process
        self.text = self.texts[self.rank]
        # Where the canvas's tokens are when each process has brought its text and its part of the image.
        tokens = torch.arange(sum(self.sizes)).split(self.sizes)
        self.canvas = torch.cat([part[text:] for part, text in zip(tokens, self.texts)])[: -refs or None]

    @classmethod
    def of(cls, model: Any, text: int, image: int, refs: int) -> Shares | None:
        """None on a single process. ValueError, of one sentence, for fewer tokens than processes."""
        return cls(_config(model)._ulysses_mesh.get_group(), text, image, refs) if degree(model) > 1 else None

    def slots(self, model: Any) -> tuple[dict, str, Any]:
        """What has the hooks take shares that are not of one size: tokens in motion are as many as they are."""
        return vars(_config(model)), "ulysses_anything", True

    def own(self, index: Tensor | None) -> Tensor | None:
        """(image tokens,) of which this process has these."""
        return None if index is None else index.tensor_split(self.count)[self.rank]

    def heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Each (B, own tokens, heads, dim) to (B, all tokens, own heads, dim), in one exchange."""
        x = torch.cat(tensors)
        parts = x.unflatten(2, (self.count, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)  # processes · own tokens, B, …
        out = x.new_empty(sum(self.sizes), *parts.shape[1:])
        dist.all_to_all_single(out, parts.contiguous(), self.sizes, [x.shape[1]] * self.count, self.group)
        return out.transpose(0, 1).chunk(len(tensors))

    def tokens(self, x: Tensor) -> Tensor:
        """(B, all tokens, own heads, dim) to (B, own tokens, heads, dim)."""
        own, parts = self.sizes[self.rank], x.transpose(0, 1).contiguous()
        out = parts.new_empty(self.count * own, *parts.shape[1:])
        dist.all_to_all_single(out, parts, [own] * self.count, self.sizes, self.group)
        return out.unflatten(0, (self.count, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)
