"""Small models of every architecture that the tests run on, with random weights and fixed seeds."""

from __future__ import annotations

from typing import Any

import tokenizers
import torch
import transformers
from torch import nn

DECODER = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, tie_word_embeddings=True))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER, head_dim=16))


def gemma3() -> nn.Module:
    settings = {**DECODER, "num_key_value_heads": 1}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**settings, head_dim=16))


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**DECODER, num_local_experts=4))


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**ENCODER))


def bert_masked() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER))


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


MODELS = {
    factory.__name__: factory
    for factory in (llama, gpt2, qwen3, gemma3, mixtral, bert, bert_masked, vit, mlp)
}


def build(name: str, seed: int = 0) -> nn.Module:
    """The model in evaluation mode."""
    torch.manual_seed(seed)
    return MODELS[name]().eval()


def example(name: str, batch: int = 2, length: int = 16, seed: int = 0) -> dict[str, Any]:
    """Inputs by name; the last row of token inputs is padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    if name == "mlp":
        return {"input": torch.randn(batch, 32, generator=generator)}
    ids = torch.randint(3, 128, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length - length // 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def run_eager(model: nn.Module, name: str, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The eager model's tensors, without a cache."""
    cache = {"use_cache": False} if name in ("llama", "gpt2", "qwen3", "gemma3", "mixtral") else {}
    with torch.no_grad():
        output = model(**inputs, **cache)
    return [output] if isinstance(output, torch.Tensor) else list(output.to_tuple())


LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;()[]<>/\n=123456789"


def letters() -> Any:
    """A tokenizer of characters, one by one, for models of 128 tokens."""
    known = {"</s>": 0, "<s>": 1, "<unk>": 2, **{letter: 3 + place for place, letter in enumerate(LETTERS)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = "{% for item in messages %}<{{ item['content'] }}>{% endfor %}"
    return made
