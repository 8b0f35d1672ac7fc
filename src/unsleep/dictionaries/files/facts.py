"""Dictionary metadata common to all formats: Sites, provenance and unsleep's own settings.

`metadata` has SAELens' vocabulary (`hook_name`, `hook_name_out`) in every format, and unsleep's own keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast, get_origin

import torch
from torch import Tensor

from unsleep.base import store
from unsleep.core import BadInput, Point, Site, check_finite
from unsleep.dictionaries.architectures import KINDS
from unsleep.dictionaries.coders import Coder

SETTINGS: dict[str, Any] = {name: kind for coder in KINDS.values() for name, kind in coder.kinds.items()}
"""Setting → JSON type, over all architectures."""

OWN: dict[str, Any] = {
    "unsleep_architecture": str,
    "unsleep_model": str,
    "unsleep_sink_norm": int | float | None,
    **{f"unsleep_{name}": kind for name, kind in SETTINGS.items()},
}
"""unsleep's own keys in `metadata`, and their types."""

UNSAID = (
    dict.fromkeys(OWN)
    | {f"unsleep_{name}": [] for name, kind in SETTINGS.items() if get_origin(kind) is list}
    | {"unsleep_architecture": "", "unsleep_model": "unknown"}
)

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
"""Supported dtypes; any other is loaded as float32."""


class Given(NamedTuple):
    """Metadata given by the caller for files that lack it."""

    site: Site | None = None
    target: Site | None = None
    model: str | None = None


class Facts(NamedTuple):
    """Metadata of a file."""

    site: Site
    target: Site | None
    model: str
    sink_norm: float
    architecture: str
    """The saved architecture; empty for files of other libraries."""
    settings: dict[str, Any]
    """Settings of all architectures; `None` or empty where the file lacks them."""
    metadata: dict[str, Any]
    """All other keys, kept on a round trip."""

    def common(self) -> dict[str, Any]:
        """Constructor arguments of every architecture, without the weights."""
        names = ("site", "target", "model", "sink_norm", "metadata")
        return {name: getattr(self, name) for name in names} | {"subtract_bias": self.target is None}


def described(dictionary: Coder) -> dict[str, Any]:
    """`metadata` for a file: the dictionary's own, its Sites and unsleep's settings."""
    kept = {key: value for key, value in dictionary.metadata.items() if key not in OWN}
    places = {"hook_name": dictionary.site, "hook_name_out": dictionary.target}
    for key, site in places.items():
        if site is None:
            kept.pop(key, None)
        elif _site_or_none(kept.get(key)) != site:  # keep the file's own spelling
            kept[key] = site.hook_name
    return kept | {
        "unsleep_architecture": dictionary.name(),
        "unsleep_model": dictionary.model,
        "unsleep_sink_norm": None if math.isinf(dictionary.sink_norm) else dictionary.sink_norm,
        **{f"unsleep_{key}": value for key, value in dictionary.settings().items()},
    }


def facts_of(
    metadata: Mapping[str, Any],
    given: Given,
    path: Path,
    *,
    found: Site | None = None,
    transcoder: bool = False,
    to: Site | None = None,
) -> Facts:
    """The facts in `metadata`, completed by the format and the caller.

    Args:
        path: the file, for errors.
        found: the Site from another part of the format.
        transcoder: True if it reconstructs another Site; `to` is that Site, from another part of the format.
    """
    own = store.fields_of({**UNSAID, **metadata}, OWN, f"{path}: metadata")
    sink_norm = own["unsleep_sink_norm"] or math.inf
    if not sink_norm > 0:
        raise BadInput(f"{path}: metadata: unsleep_sink_norm is {sink_norm}; expected over 0")
    if given.target is not None and not transcoder:
        raise BadInput(f"{path} is no transcoder; expected no target, got {given.target}")
    model = own["unsleep_model"]
    if given.model is not None:
        if model not in ("unknown", given.model):
            raise BadInput(f"{path} is of the model {model}; expected {given.model}")
        model = given.model
    return Facts(
        site=_place(metadata, "hook_name", found, given.site, "site", path),
        target=_place(metadata, "hook_name_out", to, given.target, "target", path) if transcoder else None,
        model=model,
        sink_norm=float(sink_norm),
        architecture=own["unsleep_architecture"],
        settings={name: _frozen(own[f"unsleep_{name}"]) for name in SETTINGS},
        metadata={key: value for key, value in metadata.items() if key not in OWN},
    )


def _frozen(value: Any) -> Any:
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


def _place(
    metadata: Mapping[str, Any], key: str, found: Site | None, given: Site | None, argument: str, path: Path
) -> Site:
    """The Site from a key, the format, or the caller, in this order; the caller may not contradict the others."""
    if (hook := metadata.get(key)) is not None:
        store.fields_of(metadata, {key: str}, f"{path}: metadata")
        found = _site_or_none(hook)
        if found is None and given is None:
            with store.reading(path):
                Site.from_hook_name(hook)
    if found is None and given is None:
        raise BadInput(
            f"{path}: metadata has no {key!r}, and nothing else says where the dictionary belongs; give {argument}, "
            "such as Site.parse('resid.12')"
        )
    if found is not None and given is not None and found != given:
        raise BadInput(f"{path} says that its {argument} is {found}; expected {given}")
    site = found or given
    assert site is not None
    return site


def _site_or_none(hook: Any) -> Site | None:
    """The Site of a TransformerLens hook name; the input of a block is the output of the previous one."""
    try:
        if isinstance(hook, str) and (entering := re.fullmatch(r"blocks\.(\d{1,6})\.hook_resid_pre", hook)):
            layer = int(entering[1])
            return Site(layer - 1) if layer else Site(0, "embed")
        return Site.from_hook_name(str(hook))
    except BadInput:
        return None


MODULES: dict[str, Point] = {
    "mlp": "mlp",
    "ffn": "mlp",
    "attn": "attn",
    "self_attn": "attn",
    "attention": "attn",
    "self_attention": "attn",
}
"""Module names of a block's halves."""


def site_of_module(name: str) -> Site | None:
    """The Site that is the output of a module of a Hugging Face model, such as `model.layers.12.mlp`.

    In families with a post-norm the Site is after that norm and the module before it.
    """
    if name.endswith("embed_tokens"):
        return Site(0, "embed")
    block = re.fullmatch(r"(?:.*\.)?(?:layers|layer|blocks|h)[._](\d{1,6})(?:\.(\w+))?", name)
    if block is None or (block[2] and block[2] not in MODULES):
        return None
    return Site(int(block[1]), MODULES[block[2]] if block[2] else "resid")


def module_of_site(site: Site) -> str:
    """The module whose output a Site is, in the naming of Llama and most families."""
    if site.point == "embed":
        return "embed_tokens"
    return f"layers.{site.layer}" + {"resid": "", "mlp": ".mlp", "attn": ".self_attn"}[site.point]


def checked(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    path: Path,
    label: str,
    *,
    more: Collection[str] = (),
) -> dict[str, Tensor]:
    """The tensors of `shapes`, floating-point, finite, in one of `DTYPES`.

    `label` names the file's claimed kind in errors, because a wrong label fits other
    shapes. Raises `BadInput` for a missing tensor, a wrong shape, or one in neither `shapes` nor `more`.
    """
    try:
        store.check_shapes(tensors, shapes, path)
    except BadInput as error:
        raise BadInput(f"{error}; {label}") from None
    if unknown := sorted(tensors.keys() - shapes.keys() - set(more)):
        raise BadInput(f"{path} has the tensor {unknown[0]!r}, which does not belong there; {label}")
    out: dict[str, Tensor] = {}
    for name in shapes:
        tensor = tensors[name]
        if not tensor.is_floating_point():
            raise BadInput(f"{path}: {name} has dtype {str(tensor.dtype)[6:]}; expected floating point")
        tensor = tensor if tensor.dtype in DTYPES.values() else tensor.float()
        check_finite(tensor, f"{path}: {name}")
        out[name] = tensor.contiguous()
    return out


def restored(
    said: Facts, kinds: Collection[type[Coder]], tensors: dict[str, Tensor]
) -> tuple[type[Coder], dict[str, Any]] | None:
    """The one of `kinds` that was saved under another architecture's name, and its own fields.

    `None` for files of other libraries, or ones changed since.
    """
    for kind in kinds:
        if kind.name() == said.architecture:
            own = kind.restored({name: said.settings[name] for name in kind.kinds}, tensors)
            return None if own is None else (kind, own)
    return None


def taken(metadata: dict[str, Any], library: str) -> dict[str, Any]:
    """Remove and return the config of a library that `metadata` kept under the library's name."""
    found = metadata.pop(library, None)
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}
