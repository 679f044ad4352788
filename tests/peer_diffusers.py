"""Runs diffusers' own tests of its pipelines with the pipelines rolled: a pytest plugin, for a checkout of diffusers.

    export PYTHONPATH=$PWD/tests:$PWD  # here, in this project
    cd DIFFUSERS && PEER=one python -m pytest -p peer_diffusers tests/pipelines/flux

PEER=stock: as diffusers has them, for comparison. PEER=one (what is meant if nothing is said): roll(pipe)(…) wherever a
test calls a pipeline, with no argument of rolling; its pictures are so small that they are one block. PEER=rolling:
blocks of four cells that overlap by half, with memory; tests that compare with numbers of the stock pipeline, or with a
step cache, are skipped. The hub's tiny tokenizers and configs are stood in for by ones made here, so that nothing is
downloaded; every test and every threshold is diffusers' own.
"""

import functools
import os

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
    T5Config,
)

from rolling_diffusion.models.registry import FAMILIES
from rolling_diffusion.pipeline import roll
from rolling_diffusion.pipeline.run import Transformer

MODE = os.environ.get("PEER", "one")
ROLLING = {"stock": {}, "one": {}, "rolling": {"window": 4, "overlap": 2, "draft": 0}}[MODE]
# What a rolling picture is not meant to equal, or what is refused: why a test is left out there.
STOCK_NUMBERS = "test_inference", "test_image_input"
LEFT_OUT = {
    "expected": "compares with numbers of the stock pipeline",
    "cache": "step caches are refused when rolling",
}

# The hub's names, without the hub.

WORDS = ["a", "A", "painting", "of", "squirrel", "eating", "burger", "bad", "quality", "different", "prompt", "test"]
WORDS += ["dog", "is", "dancing"]
# What is said by the user alone: the system's message would leave no room for it.
CHAT = """{% for m in messages if m.role == 'user' %}{% if m.content is string %}{{ m.content }}{% else %}
{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"""


def word_tokenizer(special: list[str], start: str | None, end: str, pad: str, length: int) -> PreTrainedTokenizerFast:
    ids = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = f"{start} $A {end}" if start else f"$A {end}"
    names = [(name, ids[name]) for name in (start, end) if name]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=names)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=special[1],
        pad_token=pad,
        eos_token=end,
        model_max_length=length,
        chat_template=CHAT,
    )


def clip():
    return word_tokenizer(["<|start|>", "<unk>", "<|end|>"], "<|start|>", "<|end|>", "<|end|>", 77)


def t5():
    return word_tokenizer(["<pad>", "<unk>", "</s>"], None, "</s>", "<pad>", 512)


def t5_config():
    return T5Config(vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, dropout_rate=0.1)


def stand_in(kind, made):
    method = kind.from_pretrained

    def from_pretrained(name, *args, **kwargs):
        return made() if str(name).startswith("hf-internal-testing/") else method(name, *args, **kwargs)

    kind.from_pretrained = from_pretrained


for kind, made in [
    (CLIPTokenizer, clip),
    (AutoTokenizer, t5),
    (AutoProcessor, t5),
    (Qwen2TokenizerFast, t5),
    (AutoConfig, t5_config),
]:
    stand_in(kind, made)

# Pipelines, rolled wherever they are called.

rolled = set()


def roll_calls_of(kind: type) -> None:
    """Calls of a pipeline's class are roll(pipe)(…) from now on; all else of the class stays."""
    stock = kind.__call__
    # A call leaves on its pipeline what these tell. With roll the pipeline stays as it was, and the tests look at it.
    told = [f"_{name}" for name in dir(kind) if isinstance(getattr(kind, name), property)]
    left = {}

    @functools.wraps(stock)
    def call(self, *args, **options):
        if isinstance(self.transformer, Transformer):  # it is roll that calls
            answer = stock(self, *args, **options)
            left.clear()
            left.update({name: vars(self)[name] for name in told if name in vars(self)})
            return answer
        answer = roll(self)(*args, **options, **ROLLING)
        vars(self).update(left)
        return answer

    if kind not in rolled:
        kind.__call__ = call
        rolled.add(kind)


def left_out(item: pytest.Item) -> str | None:
    name = f"{getattr(item.cls, '__name__', '')}.{item.originalname}".lower()  # pyright: ignore
    if "cache" in name or "pyramid_attention" in name or "pyramidattention" in name:
        return LEFT_OUT["cache"]
    return LEFT_OUT["expected"] if item.originalname in STOCK_NUMBERS else None  # pyright: ignore


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if MODE == "stock":
        return
    for item in items:
        kind = getattr(getattr(item, "cls", None), "pipeline_class", None)
        parts = {} if kind is None else kind.__init__.__annotations__
        if getattr(parts.get("transformer"), "__name__", None) in FAMILIES:
            roll_calls_of(kind)
        reason = left_out(item) if MODE == "rolling" else None
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
