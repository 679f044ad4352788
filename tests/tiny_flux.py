"""Small random Flux models and inputs, and dense references, for the tests of the models room."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import apply_rotary_emb
from torch import Tensor
from torch.nn import functional as F

from rolling_diffusion.core.memory import View
from rolling_diffusion.models.call import Levels, run
from rolling_diffusion.models.flux import Flux

CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 4, 8),
}
CHANNELS = 4  # of a cell; a token holds 2×2


def model(guidance: bool = False, seed: int = 0) -> FluxTransformer2DModel:
    """A small Flux with random weights."""
    torch.manual_seed(seed)
    made = FluxTransformer2DModel(**CONFIG, guidance_embeds=guidance).eval()
    for parameter in made.parameters():  # nothing at its initial 0 or 1, so that nothing is tested by accident
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return made


def rolling(
    model: FluxTransformer2DModel,
    call: dict,
    timestep: Tensor,
    index: Tensor | None = None,
    memory: View | None = None,
    keep: dict | None = None,
    text_level: str = "max",
    tokens: Tensor | None = None,
    size: tuple[int, int] = (8, 6),
) -> Tensor:
    """A rolling call on `inputs`: timestep (B, levels), index (tokens,); keep takes (key, value) of each layer."""
    tokens = torch.arange(call["hidden_states"].shape[1]) if tokens is None else tokens
    sink = None if keep is None else lambda layer, *kv: keep.__setitem__(layer, kv)
    levels = Levels.of(timestep, index, text_level)
    return run(Flux(model), model, call, tokens, size, levels, memory, sink)[0]


def grid(rows: int, columns: int) -> Tensor:
    """(tokens, 3) positions of a canvas, in tokens."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], -1).flatten(0, 1).float()


def inputs(
    batch: int = 2, rows: int = 4, columns: int = 3, text: int = 5, guidance: bool = False, seed: int = 1
) -> dict:
    """Arguments of a call, all but the timestep."""
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, rows * columns, CONFIG["in_channels"], generator=g),
        "encoder_hidden_states": torch.randn(batch, text, CONFIG["joint_attention_dim"], generator=g),
        "pooled_projections": torch.randn(batch, CONFIG["pooled_projection_dim"], generator=g),
        "img_ids": grid(rows, columns),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((batch,), 3.5) if guidance else None,
    }


def per_token_flux(
    model: FluxTransformer2DModel, call: dict, image_t: Tensor, text_t: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Flux written out with a modulation computed for every token: image_t (B, tokens), text_t (B, 1).

    With bias, the dense reference for memory: the batch rows are calls, and every token of every call attends to every
    token of every call under it, (B * all tokens, B * all tokens), with -inf where nothing is seen.
    """

    def temb(t: Tensor) -> Tensor:
        pooled = call["pooled_projections"].repeat_interleave(t.shape[1], 0)
        args = [t.flatten() * 1000]
        if call["guidance"] is not None:
            args.append(call["guidance"].repeat_interleave(t.shape[1]) * 1000)
        return F.silu(model.time_text_embed(*args, pooled)).unflatten(0, t.shape)

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (torch.cat([apply_rotary_emb(r[None], p, sequence_dim=1) for r, p in zip(t, ropes)]) for t in (q, k))
        if bias is not None:
            q, k, v = (t.flatten(0, 1)[None] for t in (q, k, v))
            logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5 + bias
            return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(2)[0].unflatten(0, (len(image_t), -1))
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(2)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, CONFIG["attention_head_dim"]))

    te_i, te_t = temb(image_t), temb(text_t.expand(-1, call["txt_ids"].shape[0]))
    places = call["img_ids"].expand(len(call["hidden_states"]), -1, -1)  # the same for all samples, or each its own
    ropes = [model.pos_embed(torch.cat([call["txt_ids"], ids])) for ids in places]
    x, c = model.x_embedder(call["hidden_states"]), model.context_embedder(call["encoder_hidden_states"])
    t = c.shape[1]
    for b in model.transformer_blocks:
        a = b.attn
        s1, c1, g1, s2, c2, g2 = b.norm1.linear(te_i).chunk(6, -1)
        ts1, tc1, tg1, ts2, tc2, tg2 = b.norm1_context.linear(te_t).chunk(6, -1)
        xn, cn = norm(x) * (1 + c1) + s1, norm(c) * (1 + tc1) + ts1
        o = attend(
            torch.cat([a.norm_added_q(heads(a.add_q_proj(cn))), a.norm_q(heads(a.to_q(xn)))], 1),
            torch.cat([a.norm_added_k(heads(a.add_k_proj(cn))), a.norm_k(heads(a.to_k(xn)))], 1),
            torch.cat([heads(a.add_v_proj(cn)), heads(a.to_v(xn))], 1),
        )
        x, c = x + g1 * a.to_out[0](o[:, t:]), c + tg1 * a.to_add_out(o[:, :t])
        x, c = x + g2 * b.ff(norm(x) * (1 + c2) + s2), c + tg2 * b.ff_context(norm(c) * (1 + tc2) + ts2)
    y, te = torch.cat([c, x], 1), torch.cat([te_t, te_i], 1)
    for b in model.single_transformer_blocks:
        a = b.attn
        s, c, g = b.norm.linear(te).chunk(3, -1)
        yn = norm(y) * (1 + c) + s
        o = attend(a.norm_q(heads(a.to_q(yn))), a.norm_k(heads(a.to_k(yn))), heads(a.to_v(yn)))
        y = y + g * b.proj_out(torch.cat([o, F.gelu(b.proj_mlp(yn), approximate="tanh")], -1))
    scale, shift = model.norm_out.linear(te_i).chunk(2, -1)
    return model.proj_out(norm(y[:, t:]) * (1 + scale) + shift)
