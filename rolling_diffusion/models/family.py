"""The protocol of families: all that differs between transformers. Each has a file of its own, and a line in
registry.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.order import Block
from .call import Call, Slot

Place = Tensor | slice  # tokens among others


class Family(ABC):
    """How one kind of transformer is asked for chosen tokens of a canvas.

    Sizes are in cells, pixels of the latent; a token is `patch` × `patch` cells. "Latents" have the form in which the
    family's pipelines hold them: here (B, tokens, channels), in raster order.
    """

    PROCESSORS: ClassVar[tuple[type, ...]]  # of attention, that know memory
    text_first: ClassVar[bool] = True  # in the sequence that attention sees

    def __init__(self, model: Any):
        self.patch = 2

    # Latents.

    def canvas(self, prepared: Any) -> tuple[int, int]:
        """Height and width of the canvas, from what a pipeline's `prepare_latents` gave: latents and positions."""
        ids = next(t for t in prepared[1:] if isinstance(t, Tensor) and t.shape[-1] in (3, 4))
        last = ids.flatten(0, -2).amax(0).tolist()
        return self.patch * (int(last[1]) + 1), self.patch * (int(last[2]) + 1)

    def tokens(self, block: Block, width: int) -> Tensor:
        """(tokens,) raster positions, on the whole canvas `width` cells wide, of a block's tokens."""
        if any(n % self.patch for n in (block.top, block.left, block.height, block.width)):
            raise ValueError(f"{block} does not consist of whole tokens: its sizes must be multiples of {self.patch}")
        rows = torch.arange(block.top // self.patch, (block.top + block.height) // self.patch)
        columns = torch.arange(block.left // self.patch, (block.left + block.width) // self.patch)
        return (rows[:, None] * (width // self.patch) + columns).flatten()

    def cut(self, latents: Tensor, block: Block, place: Place) -> Tensor:
        """A block's part of latents."""
        return latents[:, place]

    def paste(self, latents: Tensor, block: Block, place: Place, part: Tensor) -> None:
        """Puts a block's part into latents, in place."""
        latents[:, place] = part

    def blank(self, part: Tensor, height: int, width: int) -> Tensor:
        """Empty latents of a whole canvas, for parts like this one."""
        return part.new_zeros(len(part), height * width // self.patch**2, part.shape[2])

    @abstractmethod
    def cells(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Latents as (B, channels, height, width) cells."""

    @abstractmethod
    def latents(self, cells: Tensor) -> Tensor:
        """The inverse of `cells`."""

    def enlarged(self, latents: Tensor, size: tuple[int, int], canvas: tuple[int, int], wrap: str = "") -> Tensor:
        """Latents of a picture of `size` (height, width) cells as those of a canvas; wrap: axes of circles, of "yx"."""
        cells = self.cells(latents, *size)

        def grown(x: Tensor) -> Tensor:
            return F.interpolate(x.float(), canvas, mode="bicubic", align_corners=False).to(cells)

        found = grown(cells)
        for axis, name in ((2, "y"), (3, "x")):
            if name in wrap:  # near the edges, what the half-turned picture has there
                half, whole = cells.shape[axis] // 2, canvas[axis - 2]
                turned = grown(cells.roll(half, axis)).roll(-(whole // 2), axis)
                quarter = whole // 4
                for start in (0, whole - quarter):
                    found.narrow(axis, start, quarter).copy_(turned.narrow(axis, start, quarter))
        return self.latents(found)

    def encode(self, pipe: Any, pixels: Tensor) -> Tensor:
        """Latents of pixels (B, 3, height, width), from -1 to 1, as the family's pipelines encode a picture."""
        vae = pipe.vae
        found = vae.encode(pixels.to(vae.device, vae.dtype))
        cells = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        return self.latents((cells - vae.config.shift_factor) * vae.config.scaling_factor)

    def decode(self, pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """Latents as pixels (B, 3, 8 · height, 8 · width), from -1 to 1, as the family's pipelines decode them."""
        x = self.cells(latents, height, width) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        return pipe.vae.decode(x.to(pipe.vae.dtype), return_dict=False)[0]

    def most_shift(self, config: Any) -> float | None:
        """The largest shift of noise levels that the model was made for, as its scheduler says; None: any."""
        return config.get("max_shift", 1.15) if config.get("use_dynamic_shifting") else None

    # Requests, as pipelines make them.

    def level(self, timesteps: Tensor, request: dict[str, Any]) -> Tensor:
        """Timesteps of the scheduler as the pipeline tells them to its transformer: same numbers, same roundings."""
        return timesteps.to(request["timestep"].dtype) / 1000

    def text_tokens(self, request: dict[str, Any]) -> int:
        return request["encoder_hidden_states"].shape[1]

    def image_tokens(self, request: dict[str, Any]) -> int:
        return request["hidden_states"].shape[1]

    def with_references(self, tokens: Tensor, request: dict[str, Any], height: int, width: int) -> Tensor:
        """Positions in the request of these tokens of the canvas, and of all references after them."""
        total, references = self.image_tokens(request), self.references(request, height, width)
        if references:
            tokens = torch.cat([tokens, torch.arange(total - references, total, device=tokens.device)])
        return tokens.to(request["hidden_states"].device)

    def references(self, request: dict[str, Any], height: int, width: int) -> int:
        """Image tokens of a request that stand beside the canvas, such as those of a picture to be edited."""
        return request["hidden_states"].shape[1] - height * width // self.patch**2

    def shifted(self, request: dict[str, Any], rows: int, columns: int, tokens: int) -> dict[str, Any]:
        """The request with the places of the canvas's tokens told from (rows, columns) of it on; the same, where places
        are not told."""
        return request

    @property
    def turns(self) -> bool:
        """Do tokens have places that keys are turned by, so that a canvas can be a circle?"""
        return False

    def around(self, request: dict[str, Any], places: Tensor) -> dict[str, Any]:
        """The request with these (tokens, 2) rows and columns for the places of the canvas's tokens."""
        raise NotImplementedError

    def turned(self, model: Any, key: Tensor, by: Tensor) -> Tensor:
        """Keys (B, tokens, heads, dim), after RoPE, as of tokens that lie (tokens, 2) rows and columns further."""
        raise NotImplementedError

    def moved(self, request: dict[str, Any], rows: Tensor, columns: Tensor) -> dict[str, Any]:
        """The request with the places of its text's tokens moved by (text tokens,) rows and columns; the same, where
        text has none."""
        return request

    def blend(self, request: dict[str, Any], noise: Tensor, sigma: float) -> dict[str, Any]:
        """A request for clean latents, noised to sigma by noise (B, tokens, channels of the latents)."""
        x = request["hidden_states"]
        part = x[..., : noise.shape[1], : noise.shape[2]]
        mixed = x.clone()
        mixed[..., : noise.shape[1], : noise.shape[2]] = (1 - sigma) * part + sigma * noise.to(x)
        return request | {"hidden_states": mixed}

    @abstractmethod
    def choose(self, request: dict[str, Any], tokens: Tensor, height: int, width: int) -> dict[str, Any]:
        """The request, which comes without its timestep, for these tokens of the canvas (raster positions) and all
        references."""

    def parts(self, answer: Tensor, blocks: Sequence[Block], places: Sequence[Tensor | slice]) -> list[Tensor]:
        """A transformer's answer as parts of latents, one for each block; places: its tokens among those asked for.

        Answers for references come last, and are left out."""
        return [answer[:, place] for place in places]

    # The model.

    @abstractmethod
    def blocks(self, model: Any) -> Iterable[Any]:
        """The transformer's blocks, in order."""

    @abstractmethod
    def swaps(self, model: Any, call: Call) -> Iterator[Slot]:
        """What stands where while a rolling call runs."""

    def refusal(self, model: Any) -> str | None:
        """Why this model cannot roll as it stands, in one sentence; None if it can."""
        for block in self.blocks(model):
            kind = type(block.attn.processor)
            if kind not in self.PROCESSORS:
                names = " or ".join(known.__name__ for known in self.PROCESSORS)
                return f"the attention processor {kind.__name__} knows no memory: set {names} instead"
        return None
