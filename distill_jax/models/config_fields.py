"""Fields of a config.json that say nothing about what the model computes.

A field that is neither read nor listed here may change the computation (a multiplier of residuals, a gate, experts), so
a model that has one is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What `families` reads.
READ = frozenset(
    [
        "architectures",
        "model_type",
        "text_config",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "hidden_act",
        "hidden_activation",
        "tie_word_embeddings",
        "max_position_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "rope_local_base_freq",
        "sliding_window",
        "sliding_window_pattern",
        "_sliding_window_pattern",
        "layer_types",
        "use_sliding_window",
        "max_window_layers",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ]
)
# Training, generation, bookkeeping: of the configuration classes of transformers 4 and 5, and of published files.
WITHOUT_EFFECT = frozenset(
    [
        "add_cross_attention",
        "attention_dropout",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "name_or_path",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_labels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    ]
)


def unknown_fields(fields: Mapping[str, Any], known: frozenset[str] | set[str]) -> list[str]:
    """Fields that nobody here knows and that are set to something: neither null, false, 0 nor empty.

    Args:
      fields: of a config.json.
      known: beside `READ` and `WITHOUT_EFFECT`. Names that begin with "_" are transformers' own notes.
    """
    return sorted(
        key
        for key, value in fields.items()
        if value and key not in READ and key not in WITHOUT_EFFECT and key not in known and key[0] != "_"
    )
