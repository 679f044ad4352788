"""One call of ComfyUI's Flux for the tokens of some blocks, each at its own noise level, with memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import comfy.ldm.flux.layers as layers
import torch
from torch import Tensor

from .canvas import masked

if TYPE_CHECKING:
    from ..core.memory import Memory, View
    from ..core.order import Block
    from .flux import Call

LAYER = "rolling_diffusion_layer"  # which layer runs, in that layer's copy of the transformer options


class FluxCall:
    """What the hooks of one call share. area: (height, width, top, left) in cells of the conditioning's part.

    Tokens are grouped by noise level, in raster order within a level: at one level, exactly as in the stock call.
    """

    def __init__(
        self,
        model: Any,
        sampling: Any,
        call: Call,
        area: Sequence[int],
        patch: int,
        views: Sequence[View | None],
        memories: Sequence[Memory],
    ):
        self.model, self.sampling, self.call, self.views, self.memories = model, sampling, call, views, memories
        self.height, self.width = -(-area[0] // patch), -(-area[1] // patch)
        self.levels = sorted(set(call.sigmas), reverse=True)
        spans: list[tuple[int, int, Block]] = []  # level, token, block
        for block, sigma in zip(call.blocks, call.sigmas):
            tokens = self._tokens(block, area, patch)
            spans += [(self.levels.index(sigma), token, block) for token in tokens]
        spans.sort(key=lambda span: span[:2])
        self.tokens = [token for _, token, _ in spans]
        self.level_of = [level for level, _, _ in spans]
        self.places: dict[Block, list[int]] = {}
        for at, (_, _, block) in enumerate(spans):
            self.places.setdefault(block, []).append(at)
        self.text = 0  # text tokens, known when the first block runs
        self.dims: list[tuple] | None = None  # (start, end, level) over image tokens, if levels differ

    def _tokens(self, block: Block, area: Sequence[int], patch: int) -> list[int]:
        """Tokens of a block within the area's own grid, in raster order."""
        top, left = area[2] // patch, area[3] // patch
        rows = range(max(block.top // patch - top, 0), min(-(-block.rows.stop // patch) - top, self.height))
        columns = range(max(block.left // patch - left, 0), min(-(-block.columns.stop // patch) - left, self.width))
        return [r * self.width + c for r in rows for c in columns]

    def run(self, executor: Any, inputs: Sequence[Any], options: dict, kwargs: dict) -> Tensor:
        """The velocity on the area's canvas, in fp32 if levels differ; zero where no token moves."""
        x, timestep, context, y, guidance, references, control = inputs
        total = self.height * self.width
        self.index = torch.tensor(self.tokens, device=x.device)
        frozen = self._zero_references(references, kwargs)
        if len(self.levels) > 1 or frozen or self.levels[0] != self.call.largest:
            self._modulate(x, y, guidance, frozen)
        if control is not None:
            control = {k: [self._pick(c, total) for c in v] for k, v in control.items()}
        mask = kwargs.get("attention_mask")
        if mask is not None:
            kwargs = {**kwargs, "attention_mask": self._pick_mask(mask, total)}
        final = self.model.final_layer
        hooks = [final.register_forward_hook(lambda module, args, out: self._scatter(out, total))]
        if self.dims is not None:
            hooks.append(final.register_forward_pre_hook(self._final, with_kwargs=True))
        try:
            options = self._hooked(options, total)
            return executor(x, timestep, context, y, guidance, references, control, options, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    def _hooked(self, options: dict, total: int) -> dict:
        """The call's options with this call's hooks, around those that are there."""
        patches, replace = dict(options.get("patches", {})), dict(options.get("patches_replace", {}))
        patches["post_input"] = [*patches.get("post_input", []), lambda args: self._gather(args, total)]
        dit = dict(replace.get("dit", {}))
        depth = len(self.model.double_blocks)
        for i in range(depth):
            dit["double_block", i] = self._block(i, self._double(i), dit.get(("double_block", i)))
        for i in range(len(self.model.single_blocks)):
            dit["single_block", i] = self._block(depth + i, self._single(i), dit.get(("single_block", i)))
        previous = options.get("optimized_attention_override")

        def attention(func: Callable, *args: Any, **kw: Any) -> Tensor:
            return self._attention(previous, func, *args, **kw)

        return {
            **options,
            "patches": patches,
            "patches_replace": {**replace, "dit": dit},
            "optimized_attention_override": attention,
        }

    # --- tokens -----------------------------------------------------------------------------------------------------

    def _gather(self, args: dict, total: int) -> dict:
        """Keep the moving tokens, and all tokens behind the canvas (reference latents). Positions in fp32, and from
        the origin on."""
        image, ids = args["img"], args["img_ids"]
        index = torch.cat([self.index, torch.arange(total, image.shape[1], device=image.device)])
        if ids is not None:
            if ids.dtype in (torch.float16, torch.bfloat16):  # exact to 256 (2048) only
                ids = ids.float()
                rows = torch.arange(total, device=ids.device)
                ids[:, :total, 1], ids[:, :total, 2] = rows // self.width, rows % self.width
            if any(self.call.origin):
                ids = ids.clone()
                ids[:, :total, 1] -= self.call.origin[0]
                ids[:, :total, 2] -= self.call.origin[1]
            ids = ids[:, index]
        text_ids = args["txt_ids"]
        text_ids = text_ids if ids is None or text_ids is None else text_ids.to(ids.dtype)
        return {**args, "img": image[:, index], "img_ids": ids, "txt_ids": text_ids}

    def _pick(self, added: Tensor | None, total: int) -> Tensor | None:
        """A ControlNet's residual (B, tokens, width) of the whole canvas, for the moving tokens."""
        if added is None:
            return None
        if added.shape[1] < total:
            added = torch.nn.functional.pad(added, (0, 0, 0, total - added.shape[1]))
        return added[:, self.index]

    def _pick_mask(self, mask: Tensor, total: int) -> Tensor:
        """An attention mask over text and canvas, for the moving tokens."""
        text = mask.shape[-1] - total
        index = torch.cat([torch.arange(text, device=mask.device), text + self.index.to(mask.device)])
        mask = mask[..., index]
        return mask[..., index, :] if mask.shape[-2] == text + total else mask

    def _scatter(self, out: Tensor, total: int) -> Tensor:
        """(B, moving + references, D) to (B, canvas, D). The guider takes x0 = x - sigma * v at the call's own sigma,
        so that v is scaled to give each block x - sigma_block * v."""
        out = out[:, : len(self.tokens)]
        factors = [self.levels[level] / self.call.largest for level in self.level_of]
        if any(f != 1 for f in factors):
            out = out.float() * torch.tensor(factors, device=out.device)[:, None]
        canvas = out.new_zeros(out.shape[0], total, out.shape[2])
        canvas[:, self.index] = out
        return canvas

    # --- noise levels -----------------------------------------------------------------------------------------------

    def _zero_references(self, references: list | None, kwargs: dict) -> bool:
        """Are reference latents to be told noise level 0, whatever the canvas has?"""
        default = getattr(self.model.params, "default_ref_method", "offset")
        return bool(references) and kwargs.get("ref_latents_method", default) == "index_timestep_zero"

    def _modulate(self, x: Tensor, y: Tensor | None, guidance: Tensor | None, frozen: bool) -> None:
        """One conditioning vector per distinct level, (B, levels, width); the text takes the first, the largest."""
        model = self.model
        sigmas = torch.tensor(self.levels, device=x.device, dtype=torch.float32)
        times = self.sampling.timestep(sigmas).float()
        if frozen:
            times = torch.cat([times, times.new_zeros(1)])
        vec = model.time_in(layers.timestep_embedding(times, 256).to(x.dtype))[None]
        if model.params.guidance_embed and guidance is not None:
            vec = vec + model.guidance_in(layers.timestep_embedding(guidance, 256).to(x.dtype))[:, None]
        if getattr(model, "vector_in", None) is not None:
            if y is None:
                y = torch.zeros((x.shape[0], model.params.vec_in_dim), device=x.device, dtype=x.dtype)
            vec = vec + model.vector_in(y[:, : model.params.vec_in_dim])[:, None]
        self.vec = vec.expand(x.shape[0], -1, -1)
        self.frozen = frozen
        self.dims, start = [], 0
        for level, run in groupby(self.level_of):
            end = start + len(list(run))
            self.dims.append((start, end, _level(level)))
            start = end
        self.double_vec = self.single_vec = self.vec
        if getattr(model.params, "global_modulation", False):
            self.double_vec = model.double_stream_modulation_img(self.vec), model.double_stream_modulation_txt(self.vec)
            self.single_vec = model.single_stream_modulation(self.vec)[0]

    def _dims(self, image: int, text: int = 0) -> list[tuple]:
        """(start, end, level) over text and image tokens; references behind the canvas take the text's or level 0."""
        assert self.dims is not None
        dims = [(text + a, text + b, level) for a, b, level in self.dims]
        if text:
            dims.insert(0, (0, text, _level(0)))
        end = text + len(self.tokens)
        if text + image > end:
            dims.append((end, text + image, _level(len(self.levels) if self.frozen else 0)))
        return dims

    def _final(self, module: Any, args: tuple, kwargs: dict) -> tuple:
        return (args[0], self.vec), {"modulation_dims": self._dims(args[0].shape[1])}

    # --- the transformer's blocks -------------------------------------------------------------------------------------

    def _block(self, layer: int, run: Callable, previous: Callable | None) -> Callable:
        """A replacement of one block, inside the one that another node put there."""

        def replacement(args: dict, extra: dict) -> dict:
            stock = extra["original_block"]
            if "txt" in args:
                self.text = args["txt"].shape[1]

            def original(args: dict) -> dict:
                options = {**(args.get("transformer_options") or {}), LAYER: layer}
                args = {**args, "transformer_options": options}
                return stock(args) if self.dims is None else run(args)

            return previous(args, {**extra, "original_block": original}) if previous else original(args)

        return replacement

    def _double(self, i: int) -> Callable:
        def run(args: dict) -> dict:
            image, text = self.model.double_blocks[i](
                img=args["img"],
                txt=args["txt"],
                vec=self.double_vec,
                pe=args["pe"],
                attn_mask=args.get("attn_mask"),
                modulation_dims_img=self._dims(args["img"].shape[1]),
                modulation_dims_txt=[(0, args["txt"].shape[1], _level(0))],
                transformer_options=args["transformer_options"],
            )
            return {"img": image, "txt": text}

        return run

    def _single(self, i: int) -> Callable:
        def run(args: dict) -> dict:
            image = self.model.single_blocks[i](
                args["img"],
                vec=self.single_vec,
                pe=args["pe"],
                attn_mask=args.get("attn_mask"),
                modulation_dims=self._dims(args["img"].shape[1] - self.text, self.text),
                transformer_options=args["transformer_options"],
            )
            return {"img": image}

        return run

    # --- memory -------------------------------------------------------------------------------------------------------

    def _attention(
        self, previous: Callable | None, func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, **kw
    ) -> Tensor:
        """Attention with memory appended to keys and values, each (B, heads, tokens, dim); stores this layer's own."""
        layer = (kw.get("transformer_options") or {}).get(LAYER)
        if layer is not None:
            if self.memories:
                self._store(layer, k, v)
            if self.views:
                pairs = [view.layer(layer) for view in self.views if view is not None]
                key, value = (torch.cat(t).transpose(1, 2).to(k) for t in zip(*pairs))
                args, kw = masked(args, kw, k, partial(self._mask, k, key.shape[2]))
                k, v = torch.cat([k, key], 2), torch.cat([v, value], 2)
        if previous is not None:
            return previous(func, q, k, v, heads, *args, **kw)
        return func(q, k, v, heads, *args, **kw)

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Image keys and values by block and branch; clones, because ComfyUI may go on in place."""
        for memory, key, value in zip(self.memories, k.chunk(len(self.memories)), v.chunk(len(self.memories))):
            for block, places in self.places.items():
                index = torch.tensor(places, device=k.device) + self.text
                memory.put(self.call.store or "", block, layer, *(t[:, :, index].transpose(1, 2) for t in (key, value)))

    def _mask(self, k: Tensor, stored: int, mask: Tensor | None) -> Tensor | None:
        """The mask of these keys, with so many tokens of memory at their weights after them."""
        bias = self.views[0].bias if self.views[0] is not None else None
        if mask is None and bias is None:
            return None
        mask = torch.zeros(1, k.shape[2], device=k.device, dtype=k.dtype) if mask is None else mask
        tail = torch.zeros(stored, device=k.device) if bias is None else bias
        return torch.cat([mask, tail.to(mask).expand(*mask.shape[:-1], stored)], -1)


def _dims_take_slices() -> bool:
    """Does apply_mod index levels as m[:, i]? Then i must be a slice, or batches above 1 do not broadcast."""
    try:
        layers.apply_mod(torch.ones(2, 3, 1), torch.ones(2, 2, 1), None, [(0, 3, slice(0, 1))])
    except TypeError:
        return False
    return True


DIMS_TAKE_SLICES = _dims_take_slices()


def _level(i: int) -> Any:
    """A level's index, as this ComfyUI's apply_mod takes it."""
    return slice(i, i + 1) if DIMS_TAKE_SLICES else i
