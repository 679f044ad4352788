"""Every family: a rolling call of its transformer against the transformer's own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import make
from torch import Tensor

from rolling_diffusion.core.memory import View
from rolling_diffusion.models.call import Layer, Levels, dispatch_attention_fn, run
from rolling_diffusion.models.family import Family
from rolling_diffusion.models.registry import FAMILIES, family_of
from rolling_diffusion.pipeline.space import memory_bytes

PIPELINES = {
    "Flux": "FluxPipeline, distilled",
    "Flux with references": "FluxKontextPipeline",
    "Flux2": "Flux2Pipeline",
    "Flux2 with references": "Flux2Pipeline, editing",
    "SD3": "StableDiffusion3Pipeline",
}
HEIGHT, WIDTH = 16, 12  # cells of a canvas, that is 48 tokens


class Setting:
    """A transformer, and a request as its pipeline makes it, on a canvas of 48 tokens in two samples."""

    def __init__(self, name: str):
        pipe, _ = make(PIPELINES[name])
        self.model = pipe.transformer
        self.family: Family = family_of(self.model)
        g = torch.Generator().manual_seed(1)
        references = 5 if "references" in name else 0
        config = self.model.config
        self.request: dict[str, Any] = {
            "hidden_states": torch.randn(2, 48 + references, config.in_channels, generator=g),
            "encoder_hidden_states": torch.randn(2, 7, config.joint_attention_dim, generator=g),
        }
        if "SD3" in name:
            self.request["hidden_states"] = torch.randn(2, 4, HEIGHT, WIDTH, generator=g)
        else:
            axes = 3 if name.startswith("Flux ") or name == "Flux" else 4
            y, x = torch.meshgrid(torch.arange(HEIGHT // 2), torch.arange(WIDTH // 2), indexing="ij")
            ids = torch.zeros(48 + references, axes)
            ids[:48, 1], ids[:48, 2] = y.flatten(), x.flatten()
            ids[48:, 0], ids[48:, 2] = 1, torch.arange(references)
            self.request |= {"img_ids": ids, "txt_ids": torch.zeros(7, axes)}
            if config.guidance_embeds:
                self.request["guidance"] = torch.full((2,), 3.5)
        if "pooled_projection_dim" in config:
            self.request["pooled_projections"] = torch.randn(2, config.pooled_projection_dim, generator=g)
        self.scale = 1000.0 if "SD3" in name else 1.0

    def stock(self, level: float) -> Tensor:
        """The forward as it is, its answers to references left out."""
        out = self.model(**self.request, timestep=torch.full((2,), level * self.scale), return_dict=False)[0]
        return out if out.ndim == 4 else out[:, :48]

    def rolling(
        self, levels: list[float], index: Tensor | None = None, tokens: Tensor | None = None, view=None, keep=None
    ) -> Tensor:
        """Answers as (B, tokens, numbers)."""
        tokens = torch.arange(48) if tokens is None else tokens
        sink = None if keep is None else lambda layer, *kv: keep.__setitem__(layer, kv)
        told = Levels.of(torch.tensor(levels) * self.scale, index)
        out = run(self.family, self.model, self.request, tokens, (HEIGHT, WIDTH), told, view, sink)[0]
        return self.flat(out)[:, : len(tokens)]

    def flat(self, answer: Tensor) -> Tensor:
        if answer.ndim == 3:
            return answer
        cut = answer.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # B, C, rows, 2, columns, 2
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


@pytest.fixture(params=PIPELINES)
def setting(request) -> Setting:
    return Setting(request.param)


HALVES = (torch.arange(48) >= 24).long()


@torch.no_grad()
def test_one_level_is_the_stock_forward_and_equal_levels_are_up_to_rounding(setting: Setting):
    """Below 1e-5: a matrix product of more rows need not round as one of fewer does (see test_models_flux)."""
    expected = setting.flat(setting.stock(0.4))
    assert (setting.rolling([0.4]) - expected).abs().max() < 1e-6
    assert (setting.rolling([0.4, 0.4], HALVES) - expected).abs().max() < 1e-5
    assert (setting.rolling([0.4, 0.9], HALVES) - expected).abs().max() > 1e-3, "levels act"


@torch.no_grad()
def test_tokens_are_known_by_their_places_not_by_their_sequence(setting: Setting):
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    expected = setting.rolling([0.2, 0.7], HALVES)[:, order]
    assert (setting.rolling([0.2, 0.7], HALVES[order], order) - expected).abs().max() < 1e-5


@torch.no_grad()
def test_remembered_keys_are_the_keys_of_a_dense_call(setting: Setting):
    """Some tokens computed alone, the others in memory, against all of them at once: equal for queries and keys."""
    some, others = torch.arange(0, 48, 2), torch.arange(1, 48, 2)
    index = torch.arange(48) % 2
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    dense = setting.rolling([0.7, 0.2], index, keep=kept)
    view = View([tuple(t[:, others] for t in kept[i]) for i in range(len(kept))])  # type: ignore[arg-type]
    alone = setting.rolling([0.7], None, some, view)
    assert (alone - dense[:, some]).abs().max() < 1e-5
    assert (setting.rolling([0.7], None, some) - dense[:, some]).abs().max() > 1e-4, "memory acts"


@torch.no_grad()
def test_a_weight_on_remembered_keys_is_that_of_a_dense_masked_call(setting: Setting, monkeypatch):
    some, others = torch.arange(24), torch.arange(24, 48)
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    text, first = setting.family.text_tokens(setting.request), setting.family.text_first

    def masked(self: Layer, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Attention of the dense call, under a mask with the weight on the same keys."""
        assert self.sink is not None
        self.sink(key[:, self.canvas], value[:, self.canvas])
        bias = torch.zeros(key.shape[1])
        start = text if first else 0
        bias[start + 24 : start + 48] = -0.9
        return dispatch_attention_fn(query, key, value, attn_mask=bias[None, None, None], **options)

    with monkeypatch.context() as patch:
        patch.setattr(Layer, "attend", masked)
        dense = setting.rolling([0.7, 0.2], HALVES, keep=kept)
    pairs: Any = [tuple(t[:, others] for t in kept[i]) for i in range(len(kept))]
    alone = setting.rolling([0.7], None, some, View(pairs, torch.full((24,), -0.9)))
    assert (alone - dense[:, some]).abs().max() < 1e-5


@torch.no_grad()
def test_nothing_of_a_rolling_call_stays_on_the_model_however_it_ends(setting: Setting):
    before = {name: dict(vars(module)) for name, module in setting.model.named_modules()}
    processors = list(setting.model.attn_processors.values())
    setting.rolling([0.4, 0.9], HALVES)
    broken = setting.request.pop("encoder_hidden_states")
    setting.request["encoder_hidden_states"] = broken[..., 1:]  # fails inside of the forward
    with pytest.raises(RuntimeError):
        setting.rolling([0.4, 0.9], HALVES)
    for name, module in setting.model.named_modules():
        assert set(vars(module)) == set(before[name]), name
        assert "forward" not in vars(module)
    assert all(a is b for a, b in zip(processors, setting.model.attn_processors.values()))


@torch.no_grad()
def test_latents_are_cut_into_blocks_and_put_together_again(setting: Setting):
    from rolling_diffusion.core.order import make_order

    family = setting.family
    latents = setting.stock(0.4)
    canvas = family.blank(latents, HEIGHT, WIDTH)
    for block in make_order("spiral-out", HEIGHT, WIDTH, 4):
        place = family.tokens(block, WIDTH)
        family.paste(canvas, block, place, family.cut(latents, block, place))
    assert torch.equal(canvas, latents)
    assert family.cells(latents, HEIGHT, WIDTH).shape[2:] == (HEIGHT, WIDTH)


def test_other_transformers_are_refused_in_a_sentence_that_names_the_known():
    with pytest.raises(ValueError, match=f"Linear takes no noise level.*one of {', '.join(FAMILIES)}") as caught:
        family_of(torch.nn.Linear(2, 2))
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_the_predicted_memory_is_what_a_call_keeps(setting: Setting):
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    setting.rolling([0.5], keep=kept)
    found = sum(tensor.numel() * tensor.element_size() for pair in kept.values() for tensor in pair)
    assert found == memory_bytes(setting.model, 48, 2, torch.float32)


@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_chosen_of_a_request_is_where_the_request_is(name):
    setting = Setting(name)
    far = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in setting.request.items()}
    found = setting.family.choose(far, torch.arange(8, device="meta"), HEIGHT, WIDTH)
    assert {value.device.type for value in found.values() if isinstance(value, Tensor)} == {"meta"}
