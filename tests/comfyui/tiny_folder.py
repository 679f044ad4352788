"""A model folder like the embedded model's, with random weights: stands in for it where it is not there."""

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = ["a", "red", "blue", "house", "tree", "left", "right", "of", "under", "sun", "the", "green", "yellow", "cloud"]
LENGTH = 16


def tokenizer(special, start, end):
    ids = {word: i for i, word in enumerate([*special, *WORDS])}
    raw = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    template = f"{start} $A {end}" if start else f"$A {end}"
    marks = [(token, ids[token]) for token in (start, end) if token]
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token=special[0], eos_token=end, model_max_length=LENGTH
    )


def make(folder, seed=0, guidance=False):
    """Write the folder; returns it. guidance: whether the transformer is distilled, as FLUX.1-dev's is."""
    torch.manual_seed(seed)
    t5, clip = ("<pad>", "</s>", "<unk>"), ("<pad>", "<start>", "<unk>", "<end>")
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=AutoencoderTiny(latent_channels=16, scaling_factor=1.0, shift_factor=0.0),
        text_encoder=CLIPTextModel(CLIPTextConfig(
            vocab_size=len(clip) + len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=LENGTH, projection_dim=32, pad_token_id=0, bos_token_id=1,
            eos_token_id=3)),
        tokenizer=tokenizer(clip, "<start>", "<end>"),
        text_encoder_2=T5EncoderModel(T5Config(
            vocab_size=len(t5) + len(WORDS), d_model=32, d_kv=16, num_heads=2, d_ff=64, num_layers=2)),
        tokenizer_2=tokenizer(t5, None, "</s>"),
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=128,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(16, 56, 56),
            guidance_embeds=guidance),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    pipeline.save_pretrained(folder)
    return folder
