"""Loads any Hugging Face causal LM: hub id, local folder, PEFT adapter over a base, GGUF file, alias."""

from __future__ import annotations

import contextlib
import copy
import difflib
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from unsleep import store
from unsleep.core import BadInput, check_finite
from unsleep.machine import compute_dtype
from unsleep.models import bundled, chat
from unsleep.models.sites import assert_identity

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Quantize = Literal["none", "8bit", "4bit"]


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM with its tokenizer: what every stage takes."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """What it was loaded as."""
    stored: torch.dtype | None = None
    """Dtype of its checkpoint, where the network computes in another (see `load_model`)."""

    @property
    def stored_dtype(self) -> torch.dtype:
        """What its checkpoint holds."""
        return self.stored or self.network.dtype

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights: see `fingerprint`."""
        return fingerprint(self.network)

    @property
    def template(self) -> str:
        """Hash of the chat template that formats its prompts."""
        return chat.template_hash(self.tokenizer)

    @property
    def device(self) -> torch.device:
        """Where its inputs belong."""
        return self.network.device

    @property
    def pad_id(self) -> int:
        """The token that fills rows; it is masked, so any will do."""
        found = self.tokenizer.pad_token_id
        return found if isinstance(found, int) else 0

    @property
    def end_ids(self) -> set[int]:
        """The tokens that end a reply."""
        config = self.network.generation_config
        ids = config.eos_token_id if config else None
        listed = [*(ids if isinstance(ids, list) else [ids]), self.tokenizer.eos_token_id]
        return {i for i in listed if isinstance(i, int)}

    def token_ids(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Token ids of texts as they are; without `special`, nothing is put around them."""
        return self.tokenizer(list(texts), add_special_tokens=special)["input_ids"]

    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Rows of token ids as text, special tokens removed."""
        return self.tokenizer.batch_decode([list(row) for row in rows], skip_special_tokens=True)

    def spell(self, token: int) -> str:
        """One token as text."""
        return str(self.tokenizer.decode([token]))


def load_model(
    name: str | Path,
    *,
    dtype: Dtype = "auto",
    device: str = "auto",
    quantize: Quantize = "none",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model by hub id, local folder, adapter folder, `.gguf` file or alias.

    Args:
        name: aliases are those of `bundled.aliases`; a folder with `adapter_config.json` is a PEFT
            adapter, which is merged into its base (in float32, then rounded once) unless the base
            is quantized.
        dtype: `auto` takes the checkpoint's own, and computes in float32 where the processor would emulate it
            (`machine.compute_dtype`); the weights are equal, and are saved in the checkpoint's own again.
        device: `auto` takes CUDA where there is one.
        quantize: through bitsandbytes (extra `unsleep[quantize]`).
        trust_remote_code: run Python that the checkpoint brings. Off unless you trust its author.

    Raises:
        BadInput: nothing loadable at `name`, an unknown family, or weights that are NaN or infinite.
        Refused: the family's residual identity does not hold (see `sites.assert_identity`).
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    options["trust_remote_code"] = trust_remote_code
    if quantize != "none":
        options["quantization_config"] = _quantization(quantize)
        options["device_map"] = device
    with quiet_transformers():
        network, tokenizer = _load(str(name), options)
        stored = network.dtype
        if quantize == "none":
            if dtype == "auto":
                size = sum(weight.numel() for weight in network.parameters())
                network = moved(network, compute_dtype(stored, device, size))
            network = moved(network, device)
    network.eval().requires_grad_(False)
    _fix_quantized(network)
    for key, weight in network.named_parameters():
        if weight.is_floating_point():
            check_finite(weight, f"{name}: weight {key}")
    assert_identity(network)
    return LoadedModel(network, tokenizer, str(name), None if network.dtype == stored else stored)


def fingerprint(network: PreTrainedModel) -> str:
    """Content hash of a model's weights, 16 hex digits.

    Two models share it exactly when their weights are equal; where they sit and in which dtype they are held does not
    matter: each is hashed in the narrowest of bfloat16, float16 and float32 that holds all of its numbers.
    """
    return store.hash_tensors(dict(network.named_parameters()), _narrowest)


def _narrowest(weight: torch.Tensor) -> torch.Tensor:
    if weight.is_floating_point():
        for dtype in (torch.bfloat16, torch.float16):
            narrow = weight.to(dtype)
            if weight.dtype == dtype or torch.equal(narrow.to(weight.dtype), weight):
                return narrow
    return weight


@contextlib.contextmanager
def quiet_transformers() -> Generator[None]:
    """Silence the bars, notes and warnings of transformers and peft inside the block."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _load(name: str, options: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = bundled.packaged(name)
    if (path / "adapter_config.json").is_file():
        return _load_adapter(path, options)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BadInput(f"{path} does not exist")
        return bundled.load_gguf(path, options["dtype"])
    if path.is_dir() and not (path / "config.json").is_file():
        raise BadInput(f"{path} is a folder without config.json or adapter_config.json; expected a checkpoint")
    near = difflib.get_close_matches(name, bundled.aliases(), 1, 0.85)
    if near and name not in bundled.aliases() and not path.is_dir():
        raise BadInput(f"there is no model {name!r}; did you mean {near[0]}?")
    source = str(bundled.resolve(name))
    with _loading(name):
        network, info = cast("Any", AutoModelForCausalLM).from_pretrained(
            source, use_safetensors=True, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=options["trust_remote_code"])
    if missing := sorted(info["missing_keys"]):
        raise BadInput(
            f"{name} lacks {len(missing)} of the model's weights ({missing[0]} …); expected a whole checkpoint"
        )
    return network, tokenizer


@contextlib.contextmanager
def _loading(name: str) -> Generator[None]:
    """Raise `BadInput` naming the model, whatever a checkpoint that is missing or damaged raises inside the block."""
    try:
        yield
    except BadInput:
        raise
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        first_line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise BadInput(
            f"cannot load a model from {name!r}: {first_line} "
            f"Give a hub id, a local folder, a .gguf file or one of: {', '.join(bundled.aliases())}"
        ) from error


def _load_adapter(path: Path, options: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from peft import PeftModel

    config = store.read_json(path / "adapter_config.json")
    base_name = config.get("base_model_name_or_path")
    if not base_name:
        raise BadInput(f"{path}/adapter_config.json names no base model; set base_model_name_or_path")
    if not (path / "adapter_model.safetensors").is_file():
        raise BadInput(f"{path} has no adapter_model.safetensors; weights in any other form are not read")
    if (Path(base_name) / "adapter_config.json").is_file():
        raise BadInput(f"{path}/adapter_config.json names the base {base_name!r}, an adapter itself; expected a model")
    base, tokenizer = _load(base_name, options)
    dtype, quantized = base.dtype, "quantization_config" in options
    with _loading(str(path)):
        adapted = PeftModel.from_pretrained(base if quantized else base.float(), str(path))
    if quantized:
        return cast("Any", adapted).base_model.model, tokenizer  # never merged into packed weights
    merged = cast("PreTrainedModel", adapted.merge_and_unload())
    if (path / "chat_template.jinja").is_file():
        tokenizer.chat_template = (path / "chat_template.jinja").read_text(encoding="utf-8")
    return moved(merged, dtype), tokenizer


def _quantization(quantize: Quantize) -> Any:
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except ImportError:
        raise BadInput(f"quantize={quantize!r} needs bitsandbytes; install unsleep[quantize]") from None
    from transformers import BitsAndBytesConfig

    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _fix_quantized(network: PreTrainedModel) -> None:
    """Keep gradients after an eval pass: bitsandbytes would repack 4-bit weights for AVX512-BF16 and drop them."""
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - not in nn.Module's types


def save_plain(model: LoadedModel, folder: str | Path, *, extra: dict[str, Any] | None = None) -> None:
    """Save a checkpoint that `AutoModelForCausalLM.from_pretrained` loads with unsleep not installed.

    It is in the dtype of the checkpoint that the model came from. Raises `BadInput` where it cannot be written.
    """
    computed = model.network.dtype
    with quiet_transformers(), store.writing(Path(folder)):
        try:
            moved(model.network, model.stored_dtype).save_pretrained(folder)
        finally:
            moved(model.network, computed)
        model.tokenizer.save_pretrained(folder)
        store.share(Path(folder), Path(folder).glob("*.safetensors"))


def copy_network(network: PreTrainedModel) -> PreTrainedModel:
    """A second model with equal weights of its own, which computes the same; tied weights stay tied."""
    twin = type(network)(copy.deepcopy(network.config))
    moved(twin, network.dtype).load_state_dict(network.state_dict())
    for mine, theirs in zip(twin.buffers(), network.buffers(), strict=True):
        mine.data = theirs.data.clone()  # those that no checkpoint holds depend on the default dtype
    twin.generation_config = network.generation_config
    return moved(twin, network.device).eval().requires_grad_(False)


def moved(network: PreTrainedModel, to: torch.dtype | torch.device | str) -> PreTrainedModel:
    """The network in another dtype or place.

    A dtype is taken on by what a checkpoint holds, and by nothing else: `from_pretrained` makes rotary
    frequencies in float32 whatever the dtype. `network.to` would round them, and the model would no
    longer be the one that its own checkpoint gives.
    """
    if not isinstance(to, torch.dtype):
        return cast("Any", network).to(to)
    for tensor in network.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(to)
    return network
