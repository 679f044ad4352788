"""A rolling call: chosen tokens of a canvas at a noise level each, with memory, through a transformer's own forward.

For the length of one call, some methods of the model's own modules are swapped for ones that know of levels and
memory: how a timestep becomes a modulation, and where attention finds its keys. Nothing else is touched; afterwards all
is as it was. Swaps sit where the module's class put its forward, below every hook: offloading, casting, quantisation,
LoRA and compilation go on working around them.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo.config as dynamo
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.memory import View
from ..defaults import check_text_level
from .prompts import Prompts
from .shares import Shares

Slot = tuple[dict, str, Any]  # a dictionary, a key, and what stands there during a call
Sink = Callable[[int, Tensor, Tensor], object]  # takes a layer's number, keys and values (B, tokens, heads, dim)


class Levels:
    """The noise level of every token in a call.

    timesteps: (rows,) or (B, rows), the text's level first; or a single row, when text and image share one.
    index: (image tokens,) row of each image token; None with a single row. With several prompts the first rows are the
    text's, one a prompt; words: (text tokens,) row of each; pooled: (B, rows, width), each row's part of its prompt.
    """

    def __init__(
        self, timesteps: Tensor, index: Tensor | None, words: Tensor | None = None, pooled: Tensor | None = None
    ):
        self.timesteps, self.index, self.words, self.pooled = timesteps, index, words, pooled

    @classmethod
    def of(cls, levels: Tensor, index: Tensor | None, text_level: str = "max") -> Levels:
        """levels: (levels,) or (B, levels) timesteps; index: (image tokens,) which of them each token has."""
        check_text_level(text_level)
        if levels.shape[-1] == 1:
            return cls(levels, None)  # text and image share one row: exactly the stock computation
        if index is None:
            raise ValueError(f"index must name one of {levels.shape[-1]} levels for each image token")
        return cls(torch.cat([_of_text(levels, text_level), levels], -1), index + 1)

    @classmethod
    def of_prompts(cls, levels: Tensor, index: Tensor | None, text_level: str, prompts: Prompts, text: int) -> Levels:
        """The same for several prompts, of `text` tokens in all: a row for each prompt's words, and one for each level
        of each prompt's image tokens. levels: (B, levels)."""
        check_text_level(text_level)
        count, owner = len(prompts.weights), prompts.owner
        both = owner if index is None else index * count + owner
        kinds, place = both.unique(return_inverse=True)
        rows = torch.cat([_of_text(levels, text_level).expand(-1, count), levels[:, kinds // count]], -1)
        words = torch.arange(count, device=owner.device)
        pooled = None
        if prompts.pooled is not None:
            pooled = torch.stack(prompts.pooled, 1)[:, torch.cat([words, kinds % count])]
        return cls(rows, count + place, words.repeat_interleave(text // count), pooled)


def _of_text(levels: Tensor, text_level: str) -> Tensor:
    """(..., levels) to (..., 1)."""
    if text_level == "mean":
        return levels.mean(-1, keepdim=True)
    return levels.amax(-1, keepdim=True) if text_level == "max" else levels.amin(-1, keepdim=True)


class Layer:
    """What one block of a transformer must know in a rolling call. Travels to the tap as its attention mask.

    No layer number is read and no choice is made in compiled code: blocks would be compiled again for each.
    """

    def __init__(
        self, text: int, refs: int, text_first: bool, levels: Levels, bias: Tensor | None, shares: Shares | None
    ):
        index, self.words = levels.index, levels.words
        self.texts = 1 if levels.words is None else int(levels.words[-1]) + 1  # rows of the text
        self.shares = shares
        if shares is not None:
            index, text = shares.own(index), shares.text
        self.index = index
        if index is None or self.words is None:
            self.joint = None if index is None else F.pad(index, (text, 0))  # text tokens take row 0
        else:
            self.joint = torch.cat([self.words, index])
        # The canvas's tokens among a call's, to be kept; counted so that they are the same in calls of any size.
        self.canvas: Any = slice(text, -refs or None) if text_first else slice(None, -text or None)
        if shares is not None:
            self.canvas = shares.canvas
        self.bias = bias  # (1, 1, 1 or queries, all keys) added to the logits
        self.past: Callable[[], tuple[Tensor, Tensor]] | tuple[Tensor, Tensor] | None = None
        self.sink: Callable[[Tensor, Tensor], object] | None = None
        self.keeps, self.kept = False, None

    def image(self, modulation: Tensor, parts: int) -> Sequence[Tensor]:
        """(B, rows, parts · width) for image tokens: parts of (B, tokens or 1, width).

        One matrix product a level, then a gather to tokens: a product a token would cost as much as the MLP.
        """
        return self._spread(modulation, parts, self.index)

    def text(self, modulation: Tensor, parts: int) -> Sequence[Tensor]:
        """The same for text tokens, of the rows that are theirs: (B, `texts`, parts · width)."""
        return self._spread(modulation, parts, self.words)

    def both(self, modulation: Tensor, parts: int) -> Sequence[Tensor]:
        """The same for text and image tokens in one sequence."""
        return self._spread(modulation, parts, self.joint)

    @staticmethod
    def _spread(modulation: Tensor, parts: int, index: Tensor | None) -> Sequence[Tensor]:
        chunks = modulation.chunk(parts, dim=-1)
        return chunks if index is None else [chunk[:, index] for chunk in chunks]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Attention over the call's own tokens and memory, all (B, tokens, heads, dim); keeps the canvas's keys."""
        if self.shares is not None:
            query, key, value = self.shares.heads(query, key, value)
            options["parallel_config"] = None  # here diffusers would exchange what has been exchanged
        if self.sink is not None:
            self.sink(key[:, self.canvas], value[:, self.canvas])
        elif self.keeps:
            self.kept = key[:, self.canvas], value[:, self.canvas]
        mask = None
        if self.past is not None:
            past = self.past() if callable(self.past) else self.past
            key, value = torch.cat([key, past[0]], dim=1), torch.cat([value, past[1]], dim=1)
        if self.bias is not None:
            mask = self.bias.to(query.dtype)
            options["backend"] = AttentionBackendName.NATIVE  # most others take no mask
        attended = dispatch_attention_fn(query, key, value, attn_mask=mask, **options)
        return attended if self.shares is None else self.shares.tokens(attended)


def tap(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
    """diffusers' dispatch_attention_fn, as attention processors see it in a rolling call."""
    if isinstance(attn_mask, Layer):
        return attn_mask.attend(query, key, value, **options)
    return dispatch_attention_fn(query, key, value, attn_mask=attn_mask, **options)


@functools.cache
def _tapped(kind: type) -> type:
    """An attention processor's class with its own code, in which dispatch_attention_fn is the tap."""
    stock: Any = kind.__call__
    code = types.FunctionType(
        stock.__code__, {**stock.__globals__, "dispatch_attention_fn": tap}, stock.__name__, stock.__defaults__
    )
    code.__kwdefaults__ = stock.__kwdefaults__
    return type(f"Tapped{kind.__name__}", (kind,), {"__call__": code})


def processor(attention: Any) -> Slot:
    """The slot of an attention's processor, with its tapped twin, which shares all that it holds."""
    stock = attention.processor
    twin = object.__new__(_tapped(type(stock)))
    twin.__dict__ = stock.__dict__
    where = attention._modules if isinstance(stock, nn.Module) else vars(attention)
    return where, "processor", twin


def forward(module: nn.Module, function: Callable) -> Slot:
    """The slot that holds the forward of the module's own class, below every hook, with `function` in its place."""
    places = [(vars(module), "forward"), (vars(module), "_old_forward")]  # the latter is accelerate's
    for reference in getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ()):
        places += [(vars(reference), "original_forward"), (vars(reference), "forward")]
    own = type(module).forward
    found = [(d, key) for d, key in places if getattr(d.get(key), "__func__", None) is own]
    where, key = found[0] if found else (vars(module), "forward")
    if not found and "forward" in vars(module):
        raise ValueError(
            f"the forward of {type(module).__name__} was replaced by something that is not one of diffusers' or "
            "accelerate's hooks, so noise levels cannot reach it: remove what replaced it"
        )
    return where, key, types.MethodType(function, module)


MISSING = object()


@contextmanager
def swapped(slots: Iterable[Slot]) -> Iterator[None]:
    """Slots filled for the length of a block, and as they were after it."""
    before = []
    try:
        for where, key, value in slots:
            before.append((where, key, where.get(key, MISSING)))
            where[key] = value
        yield
    finally:
        for where, key, value in reversed(before):
            if value is MISSING:
                where.pop(key, None)
            else:
                where[key] = value


def embed_levels(self: Any, timestep: Tensor, *rest: Tensor | None) -> Tensor:
    """The forward of a timestep embedding, for (rows,) or (B, rows) timesteps: (B, rows, width)."""
    rows = timestep.shape[-1]
    sizes = [len(r) for r in rest if r is not None] + ([len(timestep)] if timestep.ndim == 2 else [])
    batch = max(1, *sizes)
    pooled = getattr(self, "rolling", None)
    more = [
        r
        if r is None
        else pooled.flatten(0, 1)
        if pooled is not None and r.ndim == 2
        else r.expand(batch, *r.shape[1:]).repeat_interleave(rows, 0)
        for r in rest
    ]
    return type(self).forward(self, timestep.expand(batch, rows).flatten(), *more).unflatten(0, (batch, rows))


def modulate_output(self: Any, x: Tensor, temb: Tensor) -> Tensor:
    """The forward of AdaLayerNormContinuous with a row for each level."""
    scale, shift = self.rolling.image(self.linear(self.silu(temb).to(x.dtype)), 2)
    return self.norm(x) * (1 + scale) + shift


def unwrapped(transformer: Any) -> Any:
    """The model inside of torch.compile's wrapper, or the model itself."""
    return getattr(transformer, "_orig_mod", transformer)


class Call:
    """One rolling call in the making: what its parts must know of it."""

    def __init__(
        self,
        text: int,
        image: int,
        refs: int,
        text_first: bool,
        levels: Levels,
        view: View | None,
        places: Any,
        shares: Shares | None,
        prompts: Prompts | None = None,
    ):
        self.prompts = prompts
        self.text, self.image, self.refs, self.text_first = text, image, refs, text_first
        self.levels, self.view, self.places, self.shares = levels, view, places, shares
        self.layers: list[Layer] = []
        self.plain = self.layer(text)  # for what knows of levels alone
        self.sink: Sink | None = None
        self.turn: Callable[[Tensor], Tensor] | None = None
        self.compiled = False

    def layer(self, text: int) -> Layer:
        memory = None if self.view is None else self.view.bias
        bias = None
        if self.prompts is not None and text:
            bias = self.prompts.bias(text, self.refs, self.text_first, memory)
        elif memory is not None:
            bias = F.pad(memory, (text + self.image, 0))[None, None, None]
        return Layer(text, self.refs, self.text_first, self.levels, bias, self.shares)

    def past(self, i: int) -> tuple[Tensor, Tensor]:
        """Keys and values of memory for the i-th attention."""
        assert self.view is not None
        key, value = self.view.layer(i)
        return (key if self.turn is None else self.turn(key)), value

    def attention(self, text: int | None = None) -> Layer:
        """For the next attention of the model, in the order in which they are met; text: its tokens of text."""
        i, layer = len(self.layers), copy.copy(self.plain) if text is None else self.layer(text)
        if self.view is not None:
            layer.past = self.past(i) if self.compiled else functools.partial(self.past, i)
        if self.sink is not None:
            layer.keeps = self.compiled
            layer.sink = None if self.compiled else functools.partial(self.sink, i)
        self.layers.append(layer)
        return layer

    def end(self) -> None:
        """Lets go of memory: parts of a call know the call, so it would stay until Python looks for such circles."""
        self.layers.clear()
        self.view = self.sink = None


def run(
    family: Any,
    transformer: Any,
    request: dict[str, Any],
    tokens: Tensor,
    size: tuple[int, int],
    levels: Levels,
    view: View | None = None,
    sink: Sink | None = None,
    prompts: Prompts | None = None,
    turn: Callable[[Tensor], Tensor] | None = None,
    **more: Any,
) -> tuple:
    """The transformer's answer to a request on chosen tokens, in the form that its forward gives.

    request: arguments of the forward for the whole canvas, of `size` (height, width) cells; more: those that are for
    the chosen tokens already. tokens: raster positions of those to compute. view: memory to attend to. sink: takes keys
    and values of these tokens, layer by layer. prompts: where the text of the request is that of several. turn:
    of keys in memory, where their places are told from elsewhere now.
    """
    model = unwrapped(transformer)
    if torch.is_grad_enabled() and getattr(model, "gradient_checkpointing", False):
        raise ValueError(
            "gradient checkpointing computes blocks once more when the call is over, and they know no levels then: "
            "call disable_gradient_checkpointing()"
        )
    request = {name: value for name, value in request.items() if name not in ("timestep", "return_dict")}
    if request.get("joint_attention_kwargs") is not None:  # forwards take entries out of it
        request["joint_attention_kwargs"] = dict(request["joint_attention_kwargs"])
    refs = family.references(request, *size)
    chosen = family.choose(request, tokens, *size)
    places = tokens.to(chosen["hidden_states"].device), *size
    if refs and levels.index is not None:  # references take the text's level
        levels = Levels(levels.timesteps, F.pad(levels.index, (0, refs)), levels.words, levels.pooled)
    text, image = family.text_tokens(chosen), family.image_tokens(chosen)
    shares = Shares.of(model, text, image, refs)
    call = Call(text, image, refs, family.text_first, levels, view, places, shares, prompts)
    call.sink, call.turn = sink, turn
    # Compiled code is handed plain tensors, and gives plain tensors back.
    compiled = [transformer, *family.blocks(model)]
    call.compiled = hasattr(transformer, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in compiled
    )
    if call.compiled:  # for the kinds of calls: with and without levels, memory, weights of memory, keeping
        dynamo.cache_size_limit = max(dynamo.cache_size_limit, 32)  # newer releases of torch: recompile_limit, too
        if shares is not None:
            raise ValueError("a compiled transformer on several devices is not known to roll: leave torch.compile out")
    slots = [] if shares is None else [shares.slots(model)]
    try:
        with swapped([*slots, *family.swaps(model, call)]):
            answer = transformer(**chosen, **more, timestep=levels.timesteps, return_dict=False)
        if sink is not None and call.compiled:
            for i, layer in enumerate(call.layers):
                if layer.kept is not None:
                    sink(i, *layer.kept)
    finally:
        call.end()
    return answer
