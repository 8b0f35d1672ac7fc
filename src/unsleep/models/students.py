"""A model whose weights are trained: LoRA matrices in its network, or a float32 copy of it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unsleep.base import store
from unsleep.core import BadInput
from unsleep.models.load import quiet_transformers, save_plain
from unsleep.models.model import LoadedModel
from unsleep.models.weights import copy_network, moved


@dataclass
class Student:
    """A base with trainable weights."""

    base: LoadedModel
    network: PreTrainedModel
    """The network that is trained: the base's own with LoRA matrices in it, or a copy."""
    adapted: Any = None
    """The `PeftModel` around the network; `None` where all weights are trained."""
    head: str | None = None
    """Name of the head, where the network is a sequence-classification model."""

    @property
    def weights(self) -> list[Tensor]:
        """The trained weights."""
        return [w for w in self.network.parameters() if w.requires_grad]

    def save(self, folder: Path, base: str) -> None:
        """Save the trained weights: an adapter over the model named `base`, or a whole checkpoint."""
        with quiet_transformers(), store.writing(folder):
            if self.adapted is None:
                save_plain(LoadedModel(moved(self.network, self.base.stored_dtype), self.base.tokenizer, ""), folder)
                return
            from unsleep.models import adapters  # peft takes a second to import

            template = cast("str | None", self.base.tokenizer.chat_template)
            adapters.save_trained(self.adapted, folder, base, template, None if self.head else torch.bfloat16)


@contextlib.contextmanager
def student(
    base: LoadedModel,
    method: str,
    rank: int,
    modules: Sequence[str],
    *,
    network: PreTrainedModel | None = None,
    head: str | None = None,
) -> Generator[Student]:
    """A base with trainable weights inside the block; afterwards it is as before, also after an exception.

    Args:
        method: `full` trains a float32 copy of all weights; `lora` and `qlora` matrices in the base's own network,
            whose weights may be quantised.
        rank: rank of the LoRA matrices.
        modules: names of the linear layers that LoRA adapts; empty for peft's default of the family.
        network: another network on the base's backbone, such as a sequence-classification model, with its `head`.

    Raises:
        BadInput: no layer of the model has one of these names.
    """
    trained = base.network if network is None else network
    if method == "full":
        whole = copy_network(trained) if network is None else copy.deepcopy(trained)
        yield Student(base, whole.float().requires_grad_(True), head=head)
        return
    from unsleep.models import adapters

    try:
        with quiet_transformers():
            adapted = adapters.trainable(trained, rank, modules, head)
    except ValueError as error:
        raise BadInput(f"LoRA cannot adapt {', '.join(modules)} of {base.name}: {error}; name others") from None
    try:
        yield Student(base, trained, adapted, head)
    finally:
        with quiet_transformers():
            adapted.unload()
        base.network.requires_grad_(False)
