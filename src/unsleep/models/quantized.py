"""Quantised weights: of a quantised checkpoint, or quantised on loading with bitsandbytes."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from transformers import PreTrainedModel
from transformers.utils.quantization_config import (
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
    QuantizationConfigMixin,
)

from unsleep.core import BadInput
from unsleep.models import weights

Quantize = Literal["none", "8bit", "4bit"]

UNPACKS: dict[str, type[QuantizationConfigMixin]] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
"""Quantisation method of a checkpoint → the config with which transformers dequantises it on loading."""


def method_of(config: Any) -> str | None:
    """Quantisation method of a checkpoint, from its config; `None` for plain weights."""
    held = getattr(config, "quantization_config", None)
    if held is None:
        return None
    given: dict[str, Any] = held if isinstance(held, dict) else held.to_dict()
    method = given.get("quant_method")
    if method is None and (given.get("load_in_4bit") or given.get("load_in_8bit")):
        return "bitsandbytes"
    return str(getattr(method, "value", method))


def is_stored_packed(config: Any) -> bool:
    """True if the weights of a checkpoint are quantised, from its config."""
    return method_of(config) is not None


def options(config: Any, quantize: Quantize, name: str) -> dict[str, Any]:
    """Arguments of `from_pretrained`; raises `BadInput` for an unsupported quantisation or a missing library."""
    method = method_of(config)
    if method in UNPACKS and quantize == "none":
        return {"quantization_config": cast("Any", UNPACKS[str(method)])(dequantize=True)}
    if method is not None and method != "bitsandbytes":
        raise BadInput(
            f"{name} has weights quantized with {method}; expected none, bitsandbytes, FP8 or MXFP4 "
            "quantization. Dequantize it first, or give the original checkpoint, with --base MODEL where it is a base"
        )
    if method is None and quantize == "none":
        return {}
    _check_library(f"{name} has weights quantized with it" if method else f"--quantize {quantize}")
    if method is not None:
        packed = "8bit" if _holds_8bit(config) else "4bit"
        if quantize not in ("none", packed):
            raise BadInput(f"{name} has {packed} weights; --quantize {quantize} cannot requantize them")
        return {}
    if quantize == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_computed_in(),
    )
    return {"quantization_config": settings}


def _computed_in() -> torch.dtype:
    """bfloat16, or float16 on a GPU without it, such as a T4."""
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def _holds_8bit(config: Any) -> bool:
    held = config.quantization_config
    given: dict[str, Any] = held if isinstance(held, dict) else held.to_dict()
    return bool(given.get("load_in_8bit"))


def _check_library(why: str) -> None:
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise BadInput(f"{why}: that needs bitsandbytes; install unsleep[quantize]") from None


def is_packed(network: PreTrainedModel) -> bool:
    """True if a network's weights are quantised."""
    return bool(getattr(network, "is_quantized", False))


def unpacked(network: PreTrainedModel, quantize: Quantize, dtype: torch.dtype | str) -> PreTrainedModel:
    """The network, with a quantised checkpoint's weights dequantised to `dtype` (`auto`: its own) where requested."""
    loaded = cast("Any", network)
    if quantize != "none" or getattr(loaded, "hf_quantizer", None) is None:
        return network
    if is_packed(network):
        plain = network.dtype if isinstance(dtype, str) else dtype
        loaded = weights.moved(loaded.dequantize(dtype=plain), plain)
    setattr(loaded, "hf_quantizer", None)  # noqa: B010 - not in nn.Module's types
    vars(loaded).pop("_weight_conversions", None)  # else save_pretrained tries to quantise again and fails
    return loaded


def keep_gradients(network: PreTrainedModel) -> None:
    """Keep gradients after an eval pass: bitsandbytes would repack 4-bit weights for AVX512-BF16 and drop them."""
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - not in nn.Module's types
