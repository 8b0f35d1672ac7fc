"""TopK: the k largest positive pre-activations of each token are active."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unsleep.core import BadInput
from unsleep.dictionaries import sparse
from unsleep.dictionaries.coders import Coder
from unsleep.dictionaries.layouts import LINEAR, Buffer, Learned, SAELens
from unsleep.dictionaries.losses import Batch, Pass, Weights, encode, sparse_pass


@dataclass(frozen=True, eq=False)
class TopK(Coder):
    """The k largest positive pre-activations are active (Gao et al. 2024, arXiv:2406.04093)."""

    k: int = 32

    has_k = True
    kinds: ClassVar[dict[str, Any]] = {"k": int | None}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.n_features:
            raise BadInput(
                f"dictionary at {self.site} has k = {self.k}; expected 1 to {self.n_features}, its number of features"
            )

    def activate(self, pre: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        """The k largest pre-activations where positive, else 0."""
        values, ids = self.sparsify(pre)
        return torch.zeros_like(pre).scatter(-1, ids, values)

    def sparsify(
        self, pre: Float[Tensor, "*token feature"]
    ) -> tuple[Float[Tensor, "*token k"], Int[Tensor, "*token k"]]:
        """The k largest pre-activations, clamped at 0, and their indices."""
        values, ids = sparse.top_k(pre, self.k)
        return values.relu(), ids

    @classmethod
    def gradients(cls, w: Weights, batch: Batch, config: Any, step: int) -> Pass:
        """Squared error only."""
        pre = encode(w, batch)
        values, ids = sparse.top_k(pre, config.k)
        return sparse_pass(w, batch, pre, sparse.code_of_top_k(values.relu().to(w.dec.dtype), ids))

    @classmethod
    def trained(cls, w: Weights, config: Any, stretch: Float[Tensor, " feature"], level: float) -> dict[str, Any]:
        """k."""
        return {"k": config.k}

    in_saelens = SAELens("topk", numbers=("k",), activation="topk")
    in_dictionary_learning = (
        Learned(
            "AutoEncoderTopK",
            "TopKTrainer",
            {**LINEAR, "encoder.bias": "b_enc", "b_dec": "b_dec"},
            subtracts=True,
            buffers={"k": Buffer("k", torch.int32), "threshold": Buffer(None, torch.float32)},
        ),
    )
    in_sparsify = "topk"

    @classmethod
    def of_saelens(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rescaled to unit decoder rows where the config normalises activations by decoder norms."""
        if not config.get("rescale_acts_by_decoder_norm"):
            return tensors
        norms = tensors["W_dec"].float().norm(dim=1)
        rescaled = {name: tensors[name] * norms for name in ("W_enc", "b_enc")}
        return {**tensors, **rescaled, "W_dec": tensors["W_dec"] / norms.clamp_min(1e-12)[:, None]}

    def to_saelens(self) -> dict[str, Any]:
        """k."""
        return {"k": self.k, "rescale_acts_by_decoder_norm": False}
