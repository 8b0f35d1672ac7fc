"""A small model in a GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

D, HEADS, KV_HEADS, HIDDEN, LAYERS = 32, 4, 2, 48, 2
TOKENS = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}A:"


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A Llama of two layers with a byte tokenizer; returns its tensors under llama.cpp's names."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(D // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    narrow = D * KV_HEADS // HEADS
    block = {"attn_norm": (D,), "attn_q": (D, D), "attn_k": (narrow, D), "attn_v": (narrow, D), "attn_output": (D, D)}
    block |= {"ffn_norm": (D,), "ffn_gate": (HIDDEN, D), "ffn_up": (HIDDEN, D), "ffn_down": (D, HIDDEN)}
    shapes = {"token_embd": (len(TOKENS), D), "output_norm": (D,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}
    random = np.random.default_rng(0)
    tensors = {f"{name}.weight": random.normal(size=s, scale=0.3).astype(np.float32) for name, s in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
