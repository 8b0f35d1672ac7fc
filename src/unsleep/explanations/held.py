"""Held-out contexts of features: windows of texts that no explanation is written from."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.activations.collect import collect
from unsleep.base.context import progress, reporting
from unsleep.core import BadInput
from unsleep.dictionaries.coders import Coder
from unsleep.explanations.judged import HeldOut, spread
from unsleep.explanations.record import Context
from unsleep.models.model import LoadedModel
from unsleep.prompts.prompt import PromptSet

WINDOW = 32
"""Tokens of a context."""


def held_out(
    model: LoadedModel,
    dictionary: Coder,
    prompts: PromptSet,
    features: Sequence[int],
    *,
    n: int = 40,
    plain: bool = False,
    batch: int = 64,
    seed: int = 0,
) -> dict[int, HeldOut]:
    """At most `n` windows per feature in which it fires, and as many in which it is silent, one per text.

    Firing windows are around a text's largest activation, evenly spaced over the ranks of these; silent ones are at
    random places of random texts. A feature that fires in no text has none. Raises `BadInput` for a feature that the
    dictionary has not.
    """
    if unknown := [f for f in features if not 0 <= f < dictionary.n_features]:
        raise BadInput(f"feature {unknown[0]} is not in a dictionary of {dictionary.n_features}")
    rows = model.encode(prompts, plain=plain)
    spelled: dict[int, str] = {}
    values: list[Float[Tensor, "token feature"]] = []
    for start in range(0, len(prompts), batch):
        part = prompts.at(range(start, min(start + batch, len(prompts))))
        with reporting(None):
            acts = collect(model, part, [dictionary.site], position="all", plain=plain)[dictionary.site]
        found = _values(dictionary, acts.tensor, features)
        values += found.split(torch.bincount(acts.prompt_index, minlength=len(part)).tolist())
        progress("held-out contexts", start + len(part), len(prompts))
    made: dict[int, HeldOut] = {}
    for column, feature in enumerate(features):
        draw = random.Random(f"{seed} {feature}")
        firing: list[tuple[float, int, int]] = []
        silent: list[tuple[int, int]] = []
        for row, of in enumerate(values):
            if not len(of):
                continue
            peak = int(of[:, column].argmax())
            if of[peak, column] > 0:
                firing.append((float(of[peak, column]), row, max(0, min(peak - WINDOW // 2, len(of) - WINDOW))))
            else:
                silent.append((row, draw.randrange(max(1, len(of) - WINDOW + 1))))
        draw.shuffle(silent)
        firing.sort(reverse=True)

        def window(row: int, start: int, column: int = column) -> Context:
            part = slice(start, start + WINDOW)
            of = values[row][part, column].tolist()
            ids = rows[row][-len(values[row]) :][part]
            tokens = tuple(spelled.setdefault(i, model.spell(i)) for i in ids)
            return Context(tokens, tuple(of), max(range(len(of)), key=of.__getitem__), prompts.name, row, "held-out")

        made[feature] = HeldOut(
            tuple(window(row, start) for _, row, start in spread(firing, n)),
            tuple(window(row, start) for row, start in silent[:n]),
        )
    return made


def _values(
    dictionary: Coder, x: Float[Tensor, "token d_model"], features: Sequence[int]
) -> Float[Tensor, "token feature"]:
    """Activations of some features."""
    columns = torch.full((dictionary.n_features,), -1)
    columns[list(features)] = torch.arange(len(features))
    found = torch.zeros(len(x), len(features))
    for part, code in dictionary.encode_in_pieces(x):
        column = columns[code.ids]
        token, place = ((column >= 0) & (code.values > 0)).nonzero(as_tuple=True)
        found[part.start + token, column[token, place]] = code.values[token, place]
    return found
