"""shapes first"""

from transformers import AutoConfig, PreTrainedConfig

TINY = dict(model_type="llama", hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
            intermediate_size=352, vocab_size=100, max_position_embeddings=1024)
QWEN = dict(model_type="qwen2", num_key_value_heads=2, vocab_size=151936, max_position_embeddings=32768,
            tie_word_embeddings=True)
SHAPES = {
    "tiny": TINY,
    "tiny-32k": TINY | {"vocab_size": 32000},
    "qwen2.5-0.5b": QWEN | dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, intermediate_size=4864),
    "qwen2.5-1.5b": QWEN | dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, intermediate_size=8960),
}


def shape(name: str, **changes) -> PreTrainedConfig:
    """The config of a model of that shape, without a download."""
    return AutoConfig.for_model(**{**SHAPES[name], **changes})
