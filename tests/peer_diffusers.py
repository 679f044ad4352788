"""Runs diffusers' own tests of FluxPipeline against RollingFluxPipeline: a pytest plugin, for a checkout of diffusers.

    export PYTHONPATH=$PWD/tests:$PWD  # here, in this project
    cd DIFFUSERS && python -m pytest -p peer_diffusers tests/pipelines/flux/test_pipeline_flux.py

PEER_STOCK=1 leaves FluxPipeline in place, for comparison. The hub's tiny tokenizers and config are stood in for by ones
made here, so that nothing is downloaded; every test and every threshold is diffusers' own.
"""

import os

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerFast, T5Config

WORDS = ["a", "painting", "of", "squirrel", "eating", "burger", "bad", "quality", "different", "prompt", "test"]


def word_tokenizer(special: list[str], start: str | None, end: str, pad: str, length: int) -> PreTrainedTokenizerFast:
    ids = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = f"{start} $A {end}" if start else f"$A {end}"
    names = [(name, ids[name]) for name in (start, end) if name]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=names)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=special[1], pad_token=pad, eos_token=end, model_max_length=length
    )


def stand_in(method, *stand_ins):
    def from_pretrained(name, *args, **kwargs):
        return stand_ins[0]() if str(name).startswith("hf-internal-testing/") else method(name, *args, **kwargs)

    return from_pretrained


T5 = T5Config(vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, dropout_rate=0.1)
CLIPTokenizer.from_pretrained = stand_in(
    CLIPTokenizer.from_pretrained,
    lambda: word_tokenizer(["<|start|>", "<unk>", "<|end|>"], "<|start|>", "<|end|>", "<|end|>", 77),
)
AutoTokenizer.from_pretrained = stand_in(
    AutoTokenizer.from_pretrained, lambda: word_tokenizer(["<pad>", "<unk>", "</s>"], None, "</s>", "<pad>", 512)
)
AutoConfig.from_pretrained = stand_in(AutoConfig.from_pretrained, lambda: T5)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("PEER_STOCK"):
        return
    import diffusers.pipelines
    from diffusers import FluxPipeline

    from rolling_diffusion.pipeline import RollingFluxPipeline

    diffusers.pipelines.RollingFluxPipeline = RollingFluxPipeline  # where one test looks for its source
    for item in items:
        kind = getattr(item, "cls", None)
        if kind is not None and getattr(kind, "pipeline_class", None) is FluxPipeline:
            kind.pipeline_class = RollingFluxPipeline
