"""Memory: stored keys and values of finished blocks (committed clean) and of waiting blocks (from the draft)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .order import Block
from .rule import Kind, Rule

KeyValue = tuple[Tensor, Tensor]  # key after RoPE and value, each (B, tokens, heads, dim)
Layers = dict[int, KeyValue]


class View:
    """What one call of the model may attend to: keys and values per layer, and the bias of each token."""

    def __init__(self, layers: Sequence[KeyValue] | _Joined, bias: Tensor | None = None, blocks: Sequence[Block] = ()):
        self._layers = layers
        self.blocks = blocks
        """Whose tokens they are, in order."""
        self.bias = bias
        """(tokens,) added to the logits, or None when every weight is 1."""

    def layer(self, i: int) -> KeyValue:
        """Key and value of layer i, each (B, tokens, heads, dim), on the device of the computation."""
        return self._layers[i]


class _Joined:
    """Keys and values of some blocks, concatenated per layer when first read, and kept.

    The blocks then hold slices of the concatenation, so that memory is stored once, not twice.
    """

    def __init__(self, parts: list[Layers], device: torch.device):
        self.parts, self.device = parts, device
        self.joined: Layers = {}

    def __getitem__(self, i: int) -> KeyValue:
        if i not in self.joined:
            if len(self.parts) == 1:
                self.joined[i] = self.parts[0][i]
            else:
                self._join(i)
        key, value = self.joined[i]
        # From host memory only the layer at work is copied to the device; on the device this is no copy.
        return key.to(self.device, non_blocking=True), value.to(self.device, non_blocking=True)

    def _join(self, i: int) -> None:
        pairs = [part[i] for part in self.parts]
        key, value = (torch.cat(tensors, dim=1) for tensors in zip(*pairs))
        self.joined[i] = key, value
        counts = [k.shape[1] for k, _ in pairs]
        for part, k, v in zip(self.parts, key.split(counts, 1), value.split(counts, 1)):
            part[i] = k, v


class Memory:
    """Keys and values that blocks in motion attend to, by a rule; one Memory per conditioning branch.

    Under the rule's cap, finished blocks that are not seen are freed when a view is taken. `device`: where to store
    (None: where they were computed). Gradients end at `put`.
    """

    def __init__(self, rule: Rule | None = None, *, device: torch.device | str | None = None):
        self.rule, self.device = rule or Rule(), device
        self._stored: dict[Kind, dict[Block, Layers]] = {"finished": {}, "waiting": {}}
        self._compute: torch.device | None = None
        self._forget()

    def put(self, kind: Kind, block: Block, layer: int, key: Tensor, value: Tensor) -> None:
        """Store a copy of one layer's key (after RoPE) and value of a block, each (B, tokens, heads, dim)."""
        if not self.rule.stores(kind):
            return
        if self.rule.size is None:
            self.rule = replace(self.rule, size=min(block.height, block.width))
        self._compute = key.device
        self._stored[kind].setdefault(block, {})[layer] = (self._own(key), self._own(value))
        self._view.clear()
        if (kind, block) in self._chosen:
            self._joined = None

    def start(self, block: Block) -> None:
        """Drop a waiting block, because its turn has come."""
        if self._stored["waiting"].pop(block, None) is not None:
            self._view.clear()

    def clear(self) -> None:
        """Free everything."""
        for blocks in self._stored.values():
            blocks.clear()
        self._forget()

    @property
    def tokens(self) -> int:
        """Tokens stored now, finished and waiting."""
        return sum(_tokens(layers) for blocks in self._stored.values() for layers in blocks.values())

    @property
    def nbytes(self) -> int:
        """Bytes that are stored now."""
        return sum(
            key.nbytes + value.nbytes
            for blocks in self._stored.values()
            for layers in blocks.values()
            for key, value in layers.values()
        )

    def view(self, moving: Sequence[Block], free: bool = True) -> View | None:
        """What the blocks in motion see, never themselves; None if nothing.

        free=False: free nothing that is out of sight, because these blocks lie ahead of those in motion.
        """
        question = (tuple(moving), free)
        if question not in self._view:
            self._view.clear()
            self._view[question] = self._select(moving, free)
        return self._view[question]

    def _select(self, moving: Sequence[Block], free: bool) -> View | None:
        rule = self.rule
        kinds: tuple[Kind, ...] = ("finished", "waiting")
        seen: list[tuple[Kind, Block, int]] = []  # kind, block, cells between it and the nearest block in motion
        for kind in kinds:
            within = rule.within(kind)
            for block, gap in _gaps(self._stored[kind], moving):
                if within is None or gap < within:
                    seen.append((kind, block, gap))
                elif kind == "finished" and free and rule.onward:
                    del self._stored[kind][block]
        if rule.cap is not None:
            seen = self._fit(seen, rule.cap, free)
        if not seen:
            return None
        blocks = [block for _, block, _ in seen]
        return View(self._join([(kind, block) for kind, block, _ in seen]), self._bias(seen), blocks)

    def _fit(self, seen: list[tuple[Kind, Block, int]], cap: int, free: bool) -> list[tuple[Kind, Block, int]]:
        """Those that rank first, up to cap tokens; finished blocks that are left out of them are freed."""
        kept, total = set(), 0
        for kind, block, _ in sorted(seen, key=lambda item: self.rule.rank(*item)):
            total += _tokens(self._stored[kind][block])
            if total > cap:
                break
            kept.add((kind, block))
        for block in list(self._stored["finished"]) if free else ():
            if ("finished", block) not in kept:
                del self._stored["finished"][block]
        return [item for item in seen if item[:2] in kept]

    def _join(self, chosen: list[tuple[Kind, Block]]) -> _Joined:
        """The concatenation of the chosen blocks, reused while they stay the same."""
        if chosen != self._chosen or self._joined is None:
            for kind, block in set(self._chosen) - set(chosen):  # a slice must not keep the whole alive
                layers = self._stored[kind].get(block, {})
                layers.update({i: (self._own(k), self._own(v)) for i, (k, v) in layers.items()})
            assert self._compute is not None
            self._joined = _Joined([self._stored[k][b] for k, b in chosen], self._compute)
            self._chosen = chosen
        return self._joined

    def _bias(self, seen: list[tuple[Kind, Block, int]]) -> Tensor | None:
        """(tokens,), the logarithm of each token's weight; None when all are 0."""
        logs = [self.rule.bias(kind, gap) for kind, _, gap in seen]
        if not any(logs):
            return None
        counts = [_tokens(self._stored[kind][block]) for kind, block, _ in seen]
        return torch.tensor(logs, dtype=torch.float32).repeat_interleave(torch.tensor(counts)).to(self._compute)

    def _own(self, tensor: Tensor) -> Tensor:
        """The tensor on the memory's device, in storage that holds nothing else, cut from its graph."""
        tensor = tensor.to(self.device or tensor.device).detach()
        return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor

    def _forget(self) -> None:
        self._view: dict[tuple, View | None] = {}
        self._joined: _Joined | None = None
        self._chosen: list[tuple[Kind, Block]] = []


def _tokens(layers: Layers) -> int:
    return next(iter(layers.values()))[0].shape[1]


def _gaps(blocks: Iterable[Block], moving: Sequence[Block]) -> list[tuple[Block, int]]:
    """Each block that is not itself in motion, with its gap in cells to the nearest block in motion."""
    inside = set(moving)
    return [(block, min(block.gap(m) for m in moving)) for block in blocks if block not in inside]
