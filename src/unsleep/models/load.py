"""Loads any Hugging Face causal LM: hub id, folder, PEFT adapters over a base, GGUF, alias.

1. The name is parsed and its files are located or downloaded (`sources`); an adapter names its base, which may
   itself be an adapter.
2. The base is loaded: missing and unexpected weights are refused.
3. Adapters are merged in order, each checked against its unmerged logits (`adapters`).
4. Tokenizer, chat template and end-of-text token are the last adapter's own, where it has them.
5. Sites are located by probing the model (`anatomy`).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import re
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from unsleep.base import store
from unsleep.base.machine import compute_dtype, device_of
from unsleep.core import BadInput, Refused, check_choices, check_finite
from unsleep.models import chat, quantized, weights
from unsleep.models.anatomy import anatomy
from unsleep.models.chat import ChatOptions
from unsleep.models.gguf import load_gguf
from unsleep.models.ignored import IgnoredKeys
from unsleep.models.model import LoadedModel
from unsleep.models.sources import CONFIG, TEMPLATE, Files, Source

Dtype = Literal["auto", "bfloat16", "float16", "float32"]

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Strategies of accelerate for a device map."""


@dataclass(frozen=True)
class LoadConfig:
    """Options of model loading; an edit is bound to the resulting weights."""

    dtype: Dtype = "auto"
    """Dtype of the weights; `auto` is the checkpoint's own, computed in float32 where the processor lacks it."""
    device: str = "auto"
    """Device such as cpu or cuda:1; `auto` is CUDA where available."""
    device_map: str | None = None
    """Spread the layers over several devices: `auto`, `balanced`, `sequential`, or a JSON file of module → device,
    where modules on `disk` and `cpu` are loaded layer by layer.
    """
    max_memory: dict[str, str] = field(default_factory=dict[str, str])
    """Device → memory limit for a computed device map, such as 0 20GiB cpu 30GiB."""
    offload: Path | None = None
    """Folder for weights that a device map offloads to disk."""
    quantize: quantized.Quantize = "none"
    """Quantise the weights with bitsandbytes; `none` dequantises those of a quantised checkpoint."""
    trust_remote_code: bool = False
    """Run Python code that the checkpoint brings. Only for authors that you trust."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    subfolder: str | None = None
    """Subfolder of the repository or folder that contains the checkpoint."""
    base: str | None = None
    """Base of an adapter, instead of the one that it names."""
    adapters: tuple[str, ...] = ()
    """Further adapters, merged in order."""
    ignore_keys: tuple[str, ...] = ()
    """Regular expressions for irrelevant keys of the files that the model has no place for."""
    chat_template: str | None = None
    """A Jinja file or a name: one of the tokenizer's own templates, or alpaca, stanford-alpaca, vicuna, llama-2,
    chatml, safe-rlhf, plain, raw.
    """
    template_args: str | None = None
    """Arguments of the chat template as JSON, such as '{"enable_thinking": false}'."""
    date: str | None = None
    """Date for chat templates that print today's, such as 2024-07-26, the default."""

    def __post_init__(self) -> None:
        if self.base is not None:
            object.__setattr__(self, "base", os.fspath(self.base))
        check_choices(self, "", dtype=Dtype, quantize=quantized.Quantize)
        for name in ("adapters", "ignore_keys"):
            if isinstance(getattr(self, name), str):
                raise BadInput.of(name, getattr(self, name), "a tuple of texts")
        for pattern in self.ignore_keys:
            try:
                re.compile(pattern)
            except (re.error, RecursionError) as error:
                raise BadInput.of("ignore_keys", pattern, f"a regular expression: {error}") from None
        if self.device_map is None and (self.max_memory or self.offload):
            raise BadInput("max_memory and offload are of a device map; pass --device-map auto with them")
        if self.device_map is not None and self.device != "auto":
            raise BadInput(f"device is {self.device!r}, and a device map is given; expected one of them")
        if self.max_memory and self.device_map not in MAPS:
            raise BadInput(f"max_memory is for a device map that is made here: {', '.join(MAPS)}")


def load_model(name: str | Path, config: LoadConfig = LoadConfig()) -> LoadedModel:
    """Load a model by hub id, local folder, adapter, `.gguf` file or alias (names: see `sources`).

    Adapters are merged into their base unless it is quantised (see `LoadConfig`). With `dtype="auto"` the model
    computes in float32 where the processor would emulate the checkpoint's dtype (`machine.compute_dtype`); the
    weights are equal, and are saved in the checkpoint's own dtypes.

    Raises:
        BadInput: nothing loadable at `name`; weights that are missing, unexpected, NaN or infinite; an unusable chat
            template; a missing base.
        Refused: block updates are not the sum of their halves (see `anatomy.examine`), or a merged adapter
            differs from the unmerged one.
    """
    options = _chat_options(config)
    device = device_of(config.device)
    ignored = IgnoredKeys(config.ignore_keys)
    with quiet_transformers():
        parts = _chain(Source.parse(str(name), config.revision, config.subfolder), config)
        further = [_adapter(Source.parse(each), config) for each in config.adapters]
        notes = _other_bases(further, parts)
        parts += further
        loaded = _assembled(parts, config, device, ignored)
        network = loaded.network
        chat.choose_template(loaded.tokenizer, config.chat_template)
        with store.reading(config.chat_template or str(name)):
            chat.check_template(loaded.tokenizer, options)
        stored = weights.dtypes(network)
        if config.quantize == "none" and not weights.is_offloaded(network):
            if config.dtype == "auto":
                size = sum(weight.numel() for weight in network.parameters())
                dtype = compute_dtype(network.dtype, device, size)
                network = weights.moved(network, dtype) if dtype != network.dtype else network
            network = network if config.device_map else weights.moved(network, device)
    _check_map(network, config)
    network.eval().requires_grad_(False)
    quantized.keep_gradients(network)
    for key, weight in weights.named(network):
        if weight.is_floating_point():
            check_finite(weight, f"{name}: weight {key}")
    with loading(str(name)):
        anatomy(network)
    changed = None if weights.dtypes(network) == stored else stored
    made_of = tuple(files.record for files in parts)
    notes = (*loaded.notes, *notes, *ignored.notes())
    beside = {"quantize": config.quantize} if config.quantize != "none" else {}
    beside |= {"ignored_keys": sorted(ignored.taken)} if ignored.taken else {}
    return LoadedModel(network, loaded.tokenizer, str(name), changed, options, made_of, notes, beside)


def is_adapter(name: str | Path, config: LoadConfig = LoadConfig()) -> bool:
    """True if a name is that of an adapter, which brings its base along; raises `BadInput` as `load_model` does."""
    with quiet_transformers():
        return Source.parse(str(name), config.revision, config.subfolder).open(config.trust_remote_code).is_adapter


def components(name: str | Path, config: LoadConfig = LoadConfig()) -> list[Files]:
    """The files of a whole checkpoint, then of the adapters over it; raises `BadInput` as `load_model` does."""
    with quiet_transformers():
        return _chain(Source.parse(str(name), config.revision, config.subfolder), config)


def tokenizer_of(files: Files) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint's or adapter's folder; raises `BadInput` where there is none."""
    with quiet_transformers(), loading(files.name):
        return _tokenizer(files, LoadConfig())


def config_of(files: Files) -> PretrainedConfig:
    """The config of a whole checkpoint; raises `BadInput` for one that cannot be read without remote code."""
    with quiet_transformers(), loading(files.name):
        return AutoConfig.from_pretrained(files.place, trust_remote_code=False)


@contextlib.contextmanager
def quiet_transformers() -> Generator[None]:
    """Silence the progress bars, notes and warnings of transformers, peft and bitsandbytes inside the block."""
    loud = [logging.getLogger(name) for name in ("bitsandbytes", "accelerate")]
    levels = [logger.level for logger in loud]
    for logger in loud:
        logger.setLevel(logging.ERROR)
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loud, levels, strict=True):
            logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def loading(name: str) -> Generator[None]:
    """Raise `BadInput` naming the model for any error that a missing or damaged checkpoint causes."""
    try:
        yield
    except (BadInput, Refused):
        raise
    except Exception as error:  # tokenizers, transformers and peft raise arbitrary types
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(f"cannot load a model from {name!r}: {said[:300]}{' …' if len(said) > 300 else ''}") from error


def _chat_options(config: LoadConfig) -> ChatOptions:
    try:
        args = json.loads(config.template_args) if config.template_args else {}
        if not isinstance(args, dict):
            raise TypeError
    except (ValueError, TypeError, RecursionError):
        raise BadInput(
            f"--template-args {config.template_args!r} is no JSON object; expected such as "
            "'{\"enable_thinking\": false}'"
        ) from None
    try:
        return ChatOptions(args, datetime.date.fromisoformat(config.date) if config.date is not None else None)
    except ValueError:
        raise BadInput(f"--date {config.date!r} is no date; expected such as 2024-07-26") from None


def _chain(source: Source, config: LoadConfig) -> list[Files]:
    """The components of a model: a whole checkpoint, then adapters up to the named one."""
    files = source.open(config.trust_remote_code)
    if not files.is_adapter:
        if config.base is not None:
            raise BadInput(f"--base {config.base}: {files.name} is a whole model, not an adapter; leave --base out")
        return [files]
    if files.has_whole_weights and config.base is None:
        raise BadInput(
            f"{files.name} has both an adapter and the weights of a whole model. Pass --base MODEL for the "
            "adapter, or give the model in a folder of its own"
        )
    chain, seen = [files], {files.place.resolve()}
    while chain[0].is_adapter:
        chain.insert(0, _base(chain[0], config.base if len(chain) == 1 else None, config))
        if chain[0].place.resolve() in seen:
            raise BadInput(
                f"{chain[1].name} names the base {chain[0].name}, whose base it is itself; pass --base MODEL"
            )
        seen.add(chain[0].place.resolve())
    return chain


def _base(adapter: Files, given: str | None, config: LoadConfig) -> Files:
    """The files of an adapter's base."""
    if given is not None:
        return Source.parse(given).open(config.trust_remote_code)
    name, revision = adapter.base
    try:
        source = Source.parse(name, None if Path(name).exists() else revision)
        return source.open(config.trust_remote_code)
    except BadInput as error:
        raise BadInput(f"{adapter.name} names the base {name!r}: {error}. Pass --base MODEL") from error


def _adapter(source: Source, config: LoadConfig) -> Files:
    files = source.open(config.trust_remote_code)
    if not files.is_adapter:
        raise BadInput(f"--adapters {files.name} is no adapter; expected a folder or a hub id with adapter_config.json")
    return files


def _other_bases(further: Sequence[Files], parts: Sequence[Files]) -> list[str]:
    """Notes on adapters that name another base; raises `BadInput` for one that is given twice."""
    known = {name for files in parts for name in (files.name, *(files.base[:1] if files.is_adapter else ()))}
    places = [files.place.resolve() for files in parts]
    for files in further:
        if files.place.resolve() in places:
            raise BadInput(f"the adapter {files.name} is given twice; give each adapter once")
        places.append(files.place.resolve())
    others = [files for files in further if files.base[0] not in known]
    return [f"{files.name} names the base {files.base[0]}; it is applied to {parts[0].name}" for files in others]


class _Loaded(NamedTuple):
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    notes: tuple[str, ...] = ()


def _assembled(parts: Sequence[Files], config: LoadConfig, device: torch.device, ignored: IgnoredKeys) -> _Loaded:
    """A base with its adapters, and the tokenizer of the last one that has any."""
    base, *own = parts
    if base.is_gguf:
        network, tokenizer = load_gguf(base.place, _dtype(config), ignored)
    else:
        with loading(base.name):
            network = _whole(base, config, device, ignored, alone=not own)
            tokenizer = _tokenizer(base, config)
    if not own:
        return _Loaded(network, tokenizer)
    base_template = tokenizer.chat_template
    bringing = [files for files in own if files.has_tokenizer]
    for files in own:
        with loading(files.name):
            tokenizer = _tokenizer(files, config, network) if files.has_tokenizer else tokenizer
            if files.has(TEMPLATE):
                tokenizer.chat_template = (files.place / TEMPLATE).read_text(encoding="utf-8")
    with loading(own[-1].name):
        from unsleep.models import adapters  # peft takes a second to import

        merge = not quantized.is_packed(network)
        network = adapters.with_adapters(network, own, len(tokenizer), merge=merge, ignored=ignored)
        _end_of_text(network, own, tokenizer)
        if config.device_map is not None and merge:
            where = config.offload and str(config.offload)
            network = weights.spread(network, _device_map(config), _memory(config), where)
    if config.chat_template is None and not tokenizer.chat_template and base_template:
        raise BadInput(
            f"{own[-1].name} has a tokenizer without a chat template, but its base has one; give the one it was "
            f"trained with: --chat-template {base.name}/{TEMPLATE} or one of {', '.join(chat.names())}"
        )
    notes = ()
    if config.chat_template is None and not bringing and not any(files.has(TEMPLATE) for files in own):
        notes = (f"{own[-1].name} has no chat template; its base's is used (override with --chat-template)",)
    return _Loaded(network, tokenizer, notes)


def _dtype(config: LoadConfig) -> Any:
    return config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)


def _whole(
    files: Files, config: LoadConfig, device: torch.device, ignored: IgnoredKeys, *, alone: bool
) -> PreTrainedModel:
    """A whole checkpoint's network; missing and unexpected weights are refused.

    With adapters to follow, it is spread over devices after their merge.
    """
    settings = AutoConfig.from_pretrained(files.place, trust_remote_code=config.trust_remote_code)
    options: dict[str, Any] = {"config": settings, "trust_remote_code": config.trust_remote_code}
    options |= quantized.options(settings, config.quantize, files.name) | {"dtype": _dtype(config)}
    if config.device_map is not None and alone:
        options |= {"device_map": _device_map(config), "max_memory": _memory(config) or None}
        options |= {"offload_folder": config.offload and str(config.offload)}
    elif config.quantize != "none" or quantized.is_stored_packed(settings):
        options["device_map"] = device
    network, info = cast("Any", AutoModelForCausalLM).from_pretrained(
        files.place, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    for key, have, wanted in sorted(info["mismatched_keys"])[:1]:
        raise BadInput(
            f"{files.name}: {key} has shape {list(have)}; its {CONFIG} makes it {list(wanted)}. Give the {CONFIG} that "
            "belongs to the weights"
        )
    if missing := sorted(info["missing_keys"]):
        raise BadInput(
            f"{files.name} lacks {len(missing)} of the model's weights ({missing[0]} …); expected a whole checkpoint"
        )
    if left := ignored.left(info["unexpected_keys"], files.name):
        raise BadInput(
            f"{files.name} holds {len(left)} weights that the model of its {CONFIG} does not have ({left[0]} …). "
            f"Pass {ignored.flag(left)} if they do not matter"
        )
    return quantized.unpacked(network, config.quantize, _dtype(config))


def _device_map(config: LoadConfig) -> Any:
    if config.device_map in MAPS:
        return config.device_map
    path = Path(str(config.device_map))
    if not path.is_file():
        raise BadInput(
            f"--device-map {config.device_map} is no file; expected auto, balanced, sequential or a JSON file"
        )
    places = store.fields_of(store.read_json(path), {}, path)
    for module, place in places.items():
        if isinstance(place, bool) or not isinstance(place, int | str):
            raise BadInput(f"{path}: {module!r} is on {str(place)[:40]!r}; expected disk, cpu or a device such as 0")
        if place != "disk":
            with store.reading(f"--device-map {path}: {module!r}"):
                device_of(f"cuda:{place}" if isinstance(place, int) else place)
    return places


def _check_map(network: PreTrainedModel, config: LoadConfig) -> None:
    """Raise `BadInput` where a device map names modules that the model does not have."""
    if config.device_map is not None and config.device_map not in MAPS:
        names = {name for name, _ in network.named_modules()} | {name for name, _ in network.named_parameters()}
        if absent := [name for name in _device_map(config) if name not in names]:
            raise BadInput(f"--device-map {config.device_map}: the model has no module {absent[0]!r}")


def _memory(config: LoadConfig) -> dict[int | str, str]:
    return {int(k) if k.isdecimal() else k: v for k, v in config.max_memory.items()}


def _tokenizer(files: Files, config: LoadConfig, network: PreTrainedModel | None = None) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer; `network` supplies the config that an adapter's folder lacks."""
    if not files.has_tokenizer:
        raise BadInput(f"{files.name} has no tokenizer; expected tokenizer.json next to its weights")
    own = {} if network is None or files.has(CONFIG) else {"config": network.config}
    return AutoTokenizer.from_pretrained(files.place, trust_remote_code=config.trust_remote_code, **own)


def _end_of_text(network: PreTrainedModel, own: Sequence[Files], tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the end-of-text token of the network to the adapter's, also for export."""
    for files in own:
        if files.has("generation_config.json"):
            network.generation_config = GenerationConfig.from_pretrained(files.place)
    settings, end = cast("Any", network.generation_config), tokenizer.eos_token_id
    if isinstance(end, int):
        known = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        listed = [i for i in known if isinstance(i, int)]
        if end not in listed:
            settings.eos_token_id = [*listed, end] if listed else end


def save_plain(model: LoadedModel, folder: str | Path) -> None:
    """Save a checkpoint that `AutoModelForCausalLM.from_pretrained` loads without unsleep.

    It has the dtypes of the original checkpoint. Raises `BadInput` where it cannot be written.
    """
    network, computed = model.network, weights.dtypes(model.network)
    with quiet_transformers(), store.writing(Path(folder)):
        try:
            if model.stored is not None:
                weights.moved(network, model.stored)
            network.save_pretrained(folder)
        finally:
            if model.stored is not None:
                weights.moved(network, computed)
        model.tokenizer.save_pretrained(folder)
        store.share(Path(folder), Path(folder).glob("*.safetensors"))
