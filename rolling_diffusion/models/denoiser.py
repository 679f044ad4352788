"""FluxDenoiser: a rolling Flux transformer and a prompt, as the denoiser that the rollout calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..core.cohort import block_seed
from ..core.memory import Memory, View
from ..core.rule import Kind, Rule
from ..defaults import check_text_level

if TYPE_CHECKING:
    from ..core.order import Block
    from ..core.rollout import Moving

PATCH = 2  # a token is 2×2 cells


def pack(x: Tensor) -> Tensor:
    """(B, C, h, w) cells to (B, tokens, 4C), channels outermost within a token, as FluxPipeline packs them."""
    x = x.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # B, C, rows, 2, columns, 2
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, tokens, 4C) to (B, C, height, width) cells: the inverse of pack."""
    x = tokens.unflatten(2, (-1, PATCH, PATCH)).unflatten(1, (height // PATCH, width // PATCH))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def token_ids(block: Block) -> Tensor:
    """(tokens, 3): 0, row and column on the canvas, in tokens, of each token of a block."""
    if any(n % PATCH for n in (block.top, block.left, block.height, block.width)):
        raise ValueError(f"{block} does not consist of whole tokens: its sizes must be multiples of {PATCH} cells.")
    rows = torch.arange(block.top // PATCH, (block.top + block.height) // PATCH)
    columns = torch.arange(block.left // PATCH, (block.left + block.width) // PATCH)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).flatten(0, 1)


@dataclass(frozen=True)
class _Layout:
    """Where the tokens of a call's blocks lie: grouped by noise level, in raster order within a level.

    So a call in which all blocks share one level is, token by token, the stock call on their union.
    """

    ids: Tensor  # (tokens, 3)
    ranges: list[int]  # tokens per level
    order: Tensor | None  # tokens of the call, as indices into the blocks' own tokens in sequence; None: the same
    places: list[Tensor | slice]  # for each block, its tokens in the call

    @classmethod
    def of(cls, blocks: Sequence[Block], levels: Sequence[int], device: torch.device) -> _Layout:
        ids = [token_ids(block) for block in blocks]
        counts = [len(i) for i in ids]
        level = torch.tensor(levels).repeat_interleave(torch.tensor(counts))
        joined = torch.cat(ids).float()  # bf16 would be exact to 256 only
        ranges = level.bincount().tolist()
        order = torch.arange(len(joined))
        for column in (joined[:, 2], joined[:, 1], level):  # stable sorts, the least significant key first
            order = order[column[order].argsort(stable=True)]
        if torch.equal(order, torch.arange(len(joined))):
            starts = [sum(counts[:i]) for i in range(len(counts))]
            return cls(joined.to(device), ranges, None, [slice(s, s + n) for s, n in zip(starts, counts)])
        places = [place.to(device) for place in order.argsort().split(counts)]
        joined = joined[order]
        return cls(joined.to(device), ranges, order.to(device), list(places))


class _Keep:
    """Puts each layer's keys and values into memory, block by block, while the call runs."""

    def __init__(self, memory: Memory, kind: Kind, blocks: Sequence[Block], places: Sequence[Tensor | slice]):
        self.memory, self.kind, self.blocks, self.places = memory, kind, blocks, places

    def __setitem__(self, layer: int, kv: tuple[Tensor, Tensor]) -> None:
        key, value = kv
        for block, place in zip(self.blocks, self.places):
            self.memory.put(self.kind, block, layer, key[:, place], value[:, place])


class _Branch(NamedTuple):
    """What one conditioning branch gives the transformer, and its memory."""

    embeds: Tensor
    pooled: Tensor
    text_ids: Tensor
    options: dict[str, Any] | None  # joint_attention_kwargs
    memory: Memory


def _compiled(transformer: Any) -> bool:
    """Whether torch.compile was applied to the transformer as a whole."""
    return hasattr(transformer, "_orig_mod") or getattr(transformer, "_compiled_call_impl", None) is not None


class FluxDenoiser:
    """x0 = x - sigma * v with v from the transformer at one noise level per block, and memory.

    prompt_embeds (B, text tokens, width), pooled (B, width): dtype and device of the computation; text_ids as in
    FluxPipeline (zeros by default). guidance: the distilled guidance, for models that embed it. cfg other than 1 needs
    negative_embeds: v = v_negative + cfg * (v_positive - v_negative), in one call of twice the batch, or in two
    (batch_cfg=False: less memory, and bit-identical to FluxPipeline's own two calls).
    joint_attention_kwargs: passed on, such as a LoRA's scale; the negative branch gets the same unless it has its own.
    rule, memory_device: see Rule and Memory. text_level: "max", "mean" or "min".
    context_noise: noise level of the blocks committed to memory. commit_waiting: whether they see waiting blocks.
    """

    def __init__(
        self,
        transformer: Any,
        prompt_embeds: Tensor,
        pooled: Tensor,
        text_ids: Tensor | None = None,
        *,
        guidance: float | Tensor | None = None,
        negative_embeds: Tensor | None = None,
        negative_pooled: Tensor | None = None,
        negative_text_ids: Tensor | None = None,
        cfg: float = 1.0,
        batch_cfg: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        negative_joint_attention_kwargs: dict[str, Any] | None = None,
        rule: Rule | None = None,
        memory_device: torch.device | str | None = None,
        text_level: str = "max",
        context_noise: float = 0.0,
        commit_waiting: bool = True,
        seed: int = 0,
    ):
        self.transformer, self.cfg, self.text_level = transformer, cfg, text_level
        self._layout: tuple[tuple, _Layout] | None = None
        self.context_noise, self.commit_waiting, self.seed = context_noise, commit_waiting, seed
        if not 0 <= context_noise < 1:
            raise ValueError(f"context_noise is {context_noise}, but it must be at least 0 (clean) and below 1.")
        if transformer.config.guidance_embeds and guidance is None:
            raise ValueError("This transformer embeds a guidance scale: give guidance, for FLUX.1-dev about 3.5.")
        self.guidance = guidance if transformer.config.guidance_embeds else None
        check_text_level(text_level)

        def branch(embeds: Tensor, pooled: Tensor, ids: Tensor | None, options: dict[str, Any] | None) -> _Branch:
            memory = Memory(rule, device=memory_device)
            return _Branch(
                embeds, pooled, embeds.new_zeros(embeds.shape[1], 3) if ids is None else ids, options, memory
            )

        own = negative_joint_attention_kwargs
        if cfg == 1:
            self._branches = [branch(prompt_embeds, pooled, text_ids, joint_attention_kwargs)]
            return
        if negative_embeds is None or negative_pooled is None:
            raise ValueError(f"cfg is {cfg}: give negative_embeds and negative_pooled, or leave cfg at 1.")
        if not batch_cfg:
            self._branches = [
                branch(prompt_embeds, pooled, text_ids, joint_attention_kwargs),
                branch(negative_embeds, negative_pooled, negative_text_ids, own or joint_attention_kwargs),
            ]
            return
        if negative_embeds.shape != prompt_embeds.shape or own is not None:
            raise ValueError(
                f"Prompt {tuple(prompt_embeds.shape)} and negative prompt {tuple(negative_embeds.shape)} do not fit "
                "one call: give embeddings of one shape and no negative_joint_attention_kwargs, or batch_cfg=False."
            )
        embeds, pooled = torch.cat([prompt_embeds, negative_embeds]), torch.cat([pooled, negative_pooled])
        self._branches = [branch(embeds, pooled, text_ids, joint_attention_kwargs)]

    @property
    def memories(self) -> list[Memory]:
        """One for each call that a tick makes: one, or with batch_cfg=False one per branch."""
        return [branch.memory for branch in self._branches]

    def denoise(self, moving: Sequence[Moving], keep: bool = False) -> Sequence[Tensor]:
        """x0 estimates, each (B, C, h, w); keep=True stores these blocks' keys and values as waiting."""
        velocities = self.velocity(moving, keep)
        return [m.x - m.sigma.to(m.x) * v for m, v in zip(moving, velocities)]

    def velocity(self, moving: Sequence[Moving], keep: bool = False) -> Sequence[Tensor]:
        """v = noise - x0 for each block, (B, C, h, w), in the dtype of x."""
        blocks, xs, sigmas = zip(*moving)
        return self._call(blocks, xs, torch.stack(sigmas), "waiting" if keep else None)

    @torch.no_grad()
    def commit(self, block: Block, x0: Tensor) -> None:
        """Run a finished block (B, C, h, w) once more, clean or at context_noise, to store its keys and values."""
        if not self.memories[0].rule.stores("finished"):
            return
        sigma = self.context_noise
        if sigma > 0:
            generator = torch.Generator().manual_seed(block_seed(self.seed, block))
            noise = torch.randn(x0.shape, generator=generator).to(x0)
            x0 = (1 - sigma) * x0 + sigma * noise
        self._call([block], [x0], torch.tensor([sigma]), "finished", waiting=self.commit_waiting)

    def start(self, block: Block) -> None:
        """A waiting block leaves memory."""
        for memory in self.memories:
            memory.start(block)

    def clear(self) -> None:
        """Free the memory."""
        for memory in self.memories:
            memory.clear()

    def _call(
        self, blocks: Sequence[Block], xs: Sequence[Tensor], sigmas: Tensor, keep: Kind | None, waiting: bool = True
    ) -> list[Tensor]:
        """Velocities of the blocks (B, C, h, w) at their sigmas (blocks,)."""
        device, dtype = self._branches[0].embeds.device, self._branches[0].embeds.dtype
        values = sigmas.tolist()
        distinct = list(dict.fromkeys(values))
        layout = self._layout_of(blocks, [distinct.index(value) for value in values], device)
        tokens = torch.cat([pack(x.to(device, dtype)) for x in xs], dim=1)
        if layout.order is not None:
            tokens = tokens[:, layout.order]
        # Times 1000 in fp32 and back in the model's dtype: FluxPipeline's own rounding of the scheduler's timesteps.
        timestep = (torch.tensor(distinct) * 1000).to(device, dtype).expand(len(xs[0]), -1) / 1000

        outputs = []
        for branch in self._branches:
            view = branch.memory.view(blocks, waiting, free=keep != "waiting")
            store = None
            if keep and branch.memory.rule.stores(keep):
                store = _Keep(branch.memory, keep, blocks, layout.places)
            outputs.append(self._run(branch, tokens, timestep, layout, view, store))
        if self.cfg != 1:
            positive, negative = outputs[0].chunk(2) if len(outputs) == 1 else outputs
            outputs = [negative + self.cfg * (positive - negative)]
        velocity = outputs[0]
        return [
            unpack(velocity[:, place], block.height, block.width).to(x)
            for block, x, place in zip(blocks, xs, layout.places)
        ]

    def _run(
        self, branch: _Branch, tokens: Tensor, timestep: Tensor, layout: _Layout, view: View | None, store: _Keep | None
    ) -> Tensor:
        """One call of the transformer: (batch, tokens, 4C) at (batch, levels) to velocities, shaped as the tokens."""
        embeds, pooled = branch.embeds, branch.pooled
        batch = tokens.shape[0]
        repeats = 2 if self.cfg != 1 and len(self._branches) == 1 else 1
        if embeds.shape[0] != batch * repeats:
            if embeds.shape[0] != repeats:
                raise ValueError(
                    f"{embeds.shape[0] // repeats} prompts meet {batch} latents: give one prompt, or {batch}."
                )
            embeds, pooled = (t.repeat_interleave(batch, dim=0) for t in (embeds, pooled))
        if repeats == 2:
            tokens, timestep = torch.cat([tokens, tokens]), torch.cat([timestep, timestep])
        guidance = self.guidance
        if guidance is not None:
            guidance = (
                torch.as_tensor(guidance, device=tokens.device, dtype=torch.float32).expand(batch).repeat(repeats)
            )
        rolling: dict[str, Any] = {}
        kept: _Keep | dict | None = store
        if _compiled(self.transformer):  # one graph: hand over plain tensors, and take plain tensors back
            model = self.transformer
            layers = len(model.transformer_blocks) + len(model.single_transformer_blocks)
            view = None if view is None else View([view.layer(i) for i in range(layers)], view.bias)
            kept = None if store is None else {}
        if view is not None or store is not None or len(layout.ranges) > 1:
            rolling = {"ranges": layout.ranges, "memory": view, "keep": kept, "text_level": self.text_level}
        velocity = self.transformer(
            hidden_states=tokens,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=timestep if rolling else timestep[:, 0],
            img_ids=layout.ids,
            txt_ids=branch.text_ids,
            guidance=guidance,
            return_dict=False,
            **({} if branch.options is None else {"joint_attention_kwargs": branch.options}),
            **rolling,
        )[0]
        if store is not None and isinstance(kept, dict):
            for layer in range(len(kept)):
                store[layer] = kept.pop(layer)
        return velocity

    def _layout_of(self, blocks: Sequence[Block], levels: Sequence[int], device: torch.device) -> _Layout:
        question = (tuple(blocks), tuple(levels), device)
        if self._layout is None or self._layout[0] != question:
            self._layout = question, _Layout.of(blocks, levels, device)
        return self._layout[1]
