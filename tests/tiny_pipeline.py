"""A tiny random FluxPipeline with every part, so that prompts are words."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from tiny_flux import CONFIG, model
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as token_models
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "a", "red", "blue", "ball", "boat", "tree", "ugly"]
LENGTH = 8


def tokenizer(pad: str, start: str = "") -> PreTrainedTokenizerFast:
    ids = {word: i for i, word in enumerate(WORDS)}
    words: Any = Tokenizer(token_models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, ids[word]) for word in ("<s>", "</s>")]
    words.post_processor = processors.TemplateProcessing(single=f"{start} $A </s>".strip(), special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token=pad, eos_token="</s>", model_max_length=LENGTH
    )


def parts(guidance: bool = False, dynamic: bool = True) -> dict[str, Any]:
    """What FluxPipeline is made of, with random weights; the same ones in every call."""
    torch.manual_seed(0)
    text, pooled = CONFIG["joint_attention_dim"], CONFIG["pooled_projection_dim"]
    t5 = T5Config(vocab_size=len(WORDS), d_model=text, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    clip = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=pooled,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        eos_token_id=3,
        bos_token_id=2,
        pad_token_id=0,
    )
    vae = AutoencoderKL(
        block_out_channels=(4,),
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic),
        "vae": vae.eval(),
        "text_encoder": CLIPTextModel(clip).eval(),
        "tokenizer": tokenizer("</s>", "<s>"),
        "text_encoder_2": T5EncoderModel(t5).eval(),
        "tokenizer_2": tokenizer("<pad>"),
        "transformer": model(guidance),
    }


def pipeline(guidance: bool = False, dynamic: bool = True) -> FluxPipeline:
    """A silent pipeline with random weights; the same ones in every call."""
    pipe = FluxPipeline(**parts(guidance, dynamic))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, seed: int = 1, **changes: Any) -> Any:
    """The images of a short call; latents unless it is said otherwise."""
    arguments: dict[str, Any] = {
        "prompt": "a red ball",
        "height": 16,
        "width": 12,
        "num_inference_steps": 4,
        "max_sequence_length": LENGTH,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    }
    if "prompt_embeds" in changes:
        del arguments["prompt"]
    return pipe(**(arguments | changes)).images


ROLL: dict[str, Any] = {"window": 8, "overlap": 4, "draft": 0}  # on 16 × 12 cells: 4 strips of 4, lag 2 of 4 steps
