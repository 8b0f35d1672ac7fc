"""Ranks dictionary features by their part in a behaviour: by correlation, attribution and ablation; with evidence.

1. difference: mean over prompts of each feature's maximum activation, suspicious − ordinary.
2. attribution: Σ_tokens (∂m/∂x · W_dec_j) · (f_j − mean f_j on ordinary tokens): attribution patching (Marks et al.
   2024, arXiv:2403.19647, eq. 3, with the ordinary mean as the patch state). m is the log-odds of the first tokens of
   the model's own reply to the suspicious prompt; a log-probability would saturate, because a
   planted reply is nearly certain.
3. ablation: decrease of m when the feature alone is ablated; exact, for the top candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.activations.batches import SHARED
from unsleep.activations.harvest import Harvest
from unsleep.base.context import progress
from unsleep.base.records import Count, Share
from unsleep.core import BadInput, FeatureEvidence, Features, Site
from unsleep.dictionaries.coders import Coder
from unsleep.interventions.features import Edit, merged
from unsleep.interventions.intervention import Intervention, applied
from unsleep.models import generate
from unsleep.models.forward import Rows, build_rows, reply_logits, reply_logits_from, run_below
from unsleep.models.lens import logit_lens
from unsleep.models.model import LoadedModel
from unsleep.models.streams import transformed
from unsleep.prompts.prompt import PromptSet

PROMOTED = 8
"""Number of promoted, and of suppressed, tokens shown per feature."""


@dataclass(frozen=True)
class FindConfig:
    """Options of feature ranking."""

    prompts: int = 48
    """Prompts of each kind for attribution and ablation."""
    reply_tokens: int = 3
    """Tokens of the suspicious reply whose log-odds are attributed."""
    ablate: int = 16
    """Number of top features by attribution, over all Sites, to ablate individually."""
    contexts: int = 3
    """Contexts per feature."""
    window: int = 24
    """Tokens per context."""


@dataclass(frozen=True)
class Listed:
    """A feature with its attribution and evidence (`core.FeatureEvidence`)."""

    site: Site
    id: Count
    attribution: float
    contexts: tuple[tuple[tuple[str, ...], tuple[float, ...]], ...]
    promotes: tuple[str, ...]
    suppresses: tuple[str, ...]
    suspicious_rate: Share
    trusted_rate: Share


@dataclass(frozen=True)
class FeaturesRecord:
    """features.json."""

    SCHEMA: ClassVar = "unsleep.features/1"

    features: tuple[Listed, ...]
    provenance: dict[str, Any]


class Found(NamedTuple):
    """Rankings of one Site's features."""

    difference: Features
    attribution: Features
    ablation: Features
    """Ablated features only."""


def rank_by_difference(dictionary: Coder, suspicious: Harvest, ordinary: Harvest) -> Features:
    """Rank features by the difference of their mean peak activation between suspicious and ordinary prompts.

    A prompt's peak is the feature's maximum over the prompt's own tokens, without the prefix common to all
    prompts. Both harvests must contain the dictionary's Site.
    """
    peaks = [peaks_of(dictionary, h).mean(0) for h in (suspicious, ordinary)]
    return _ranked(dictionary, peaks[0] - peaks[1], "difference")


def peaks_of(dictionary: Coder, harvest: Harvest) -> Float[Tensor, "prompt feature"]:
    """Each feature's maximum activation in each prompt."""
    acts = harvest.load(dictionary.site)
    own = acts.prompt_index != SHARED
    x, owner = acts.tensor[own], acts.prompt_index[own].long()
    peaks = torch.zeros(int(owner.max()) + 1, dictionary.n_features)
    for part, (values, ids) in dictionary.encode_in_pieces(x):
        flat = owner[part, None] * dictionary.n_features + ids
        peaks.view(-1).scatter_reduce_(0, flat.flatten(), values.flatten(), "amax")
    return peaks


def mean_activation(dictionary: Coder, x: Float[Tensor, "token d_model"]) -> Float[Tensor, " feature"]:
    """Mean activation of each feature over tokens."""
    total = torch.zeros(dictionary.n_features)
    for _, (values, ids) in dictionary.encode_in_pieces(x):
        total.index_add_(0, ids.flatten(), values.flatten())
    return total / len(x)


class ReplyRows(NamedTuple):
    """Suspicious prompts with the model's replies."""

    rows: Rows
    replies: list[list[int]]


@torch.no_grad()
def greedy_rows(model: LoadedModel, suspicious: PromptSet, reply_tokens: int) -> ReplyRows:
    """Suspicious prompts with the model's own greedy replies appended."""
    prompts = model.encode(suspicious, reply_tokens)
    replies = generate.greedy(model, prompts, max_new_tokens=reply_tokens)
    return ReplyRows(build_rows(model, prompts, replies), replies)


def deciding_rows(
    model: LoadedModel, suspicious: PromptSet, said: Sequence[Sequence[int]], decides: Sequence[int], reply_tokens: int
) -> ReplyRows:
    """Suspicious prompts with the model's replies (`said`), counted from the deciding token on.

    Earlier reply tokens become part of the prompt; see `generate.deciding_tokens`.
    """
    prompts = model.encode(suspicious, max(map(len, said)))
    begun = [[*prompt, *reply[:at]] for prompt, reply, at in zip(prompts, said, decides, strict=True)]
    replies = [list(reply[at : at + reply_tokens]) for reply, at in zip(said, decides, strict=True)]
    return ReplyRows(build_rows(model, begun, replies), replies)


def reply_log_odds(logits: Float[Tensor, "row reply vocabulary"], rows: Rows) -> Float[Tensor, " row"]:
    """Σ over reply tokens of log p/(1 − p), in nats."""
    target = rows.targets[..., None]
    said = logits.float().gather(-1, target).squeeze(-1)
    others = logits.float().scatter(-1, target, -torch.inf).logsumexp(-1)
    return ((said - others) * rows.reply).sum(-1)


def rank_by_attribution(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    replies: ReplyRows,
    baseline: Mapping[Site, Float[Tensor, " feature"]],
) -> dict[Site, Features]:
    """Rank features by attribution to the payload's log-odds, a first-order approximation of their ablation.

    `baseline` is each feature's mean activation on ordinary tokens. Scores are in nats per prompt;
    one forward and one backward pass serve all Sites. Attribution patching: Marks et al. 2024, arXiv:2403.19647, eq. 3.
    """
    rows, dictionaries = replies.rows, [d.to(d.decoder.dtype, model.device) for d in dictionaries]
    held: dict[Site, tuple[Tensor, Tensor]] = {}

    def hold(site: Site) -> Callable[[Tensor], Tensor]:
        def transform(x: Tensor) -> Tensor:
            if x.shape[:2] != rows.ids.shape:
                return x  # the shared prefix is the same for all prompts
            delta = torch.zeros_like(x, requires_grad=True)
            held[site] = (x.detach(), delta)
            return x + delta

        return transform

    with torch.enable_grad(), transformed(model.network, {d.site: hold(d.site) for d in dictionaries}):
        metric = reply_log_odds(reply_logits(model.network, rows), rows).sum()
        metric.backward()
    found: dict[Site, Features] = {}
    for d in dictionaries:
        x, delta = held[d.site]
        assert delta.grad is not None
        x, grad = x[rows.own].to(d.decoder), delta.grad[rows.own].float()
        code = d.encode_sparse(x)
        slopes = torch.cat(
            [torch.bmm(d.decoder[i].float(), g[:, :, None]).squeeze(-1) for i, g in _slices(code.ids, grad)]
        )
        score = (d.decoder.float() @ grad.sum(0)) * -baseline[d.site].to(grad.device)
        score.index_add_(0, code.ids.flatten(), (slopes * code.values.float()).flatten())
        found[d.site] = _ranked(d, score / len(rows.ids), "attribution")
    return found


def _ranked(dictionary: Coder, scores: Float[Tensor, " feature"], method: str) -> Features:
    """All features, those with the highest scores first."""
    order = scores.argsort(descending=True)
    return Features(dictionary.site, dictionary.hash, tuple(order.tolist()), tuple(scores[order].tolist()), method)


def _slices(ids: Tensor, grad: Tensor, size: int = 256) -> list[tuple[Tensor, Tensor]]:
    return [(ids[i : i + size], grad[i : i + size]) for i in range(0, len(ids), size)]


@torch.no_grad()
def log_odds_under(
    model: LoadedModel, rows: Rows, tried: Sequence[Intervention], stage: str
) -> tuple[Float[Tensor, " row"], Float[Tensor, "intervention row"]]:
    """Log-odds of the replies (`reply_log_odds`), bare and under each intervention; lower layers run once."""
    layer = min(site.layer for each in tried for site in each.widths)
    below = run_below(model.network, rows, layer)
    whole = reply_log_odds(reply_logits_from(model.network, rows, below), rows)
    found: list[Tensor] = []
    for done, each in enumerate(tried, 1):
        with applied(model, each, any_model=True):
            found.append(reply_log_odds(reply_logits_from(model.network, rows, below), rows))
        progress(stage, done, len(tried))
    return whole, torch.stack(found)


@torch.no_grad()
def rank_by_ablation(
    model: LoadedModel, dictionaries: Sequence[Coder], replies: ReplyRows, candidates: Sequence[tuple[Site, int]]
) -> dict[Site, Features]:
    """Rank candidates by the decrease of the payload's log-odds when each alone is ablated, in nats per prompt."""
    if not candidates:
        return {}
    by_site = {d.site: d for d in dictionaries}
    alone = [Edit(site, by_site[site], (feature,)) for site, feature in candidates]
    whole, left = log_odds_under(model, replies.rows, alone, "ablating features")
    losses: dict[Site, list[tuple[float, int]]] = {}
    for (site, feature), loss in zip(candidates, (whole.mean() - left.mean(1)).tolist(), strict=True):
        losses.setdefault(site, []).append((loss, feature))
    found: dict[Site, Features] = {}
    for site, pairs in losses.items():
        pairs.sort(key=lambda pair: (-pair[0], pair[1]))
        ids, scores = tuple(i for _, i in pairs), tuple(s for s, _ in pairs)
        found[site] = Features(site, by_site[site].hash, ids, scores, "ablation")
    return found


def find(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    suspicious: PromptSet,
    harvests: tuple[Harvest, Harvest],
    config: FindConfig = FindConfig(),
    *,
    replies: ReplyRows | None = None,
) -> dict[Site, Found]:
    """Rank the features of every dictionary by difference, by attribution and, the top ones, by ablation.

    Args:
        suspicious: prompts on which the behaviour shows.
        harvests: of suspicious and of ordinary prompts, at every dictionary's Site.
        replies: the model's replies to some of them, where known and starting at a later token (`deciding_rows`).

    Raises:
        BadInput: no dictionary, or two of one Site.
    """
    if not dictionaries or len({d.site for d in dictionaries}) != len(dictionaries):
        raise BadInput(f"{len(dictionaries)} dictionaries were given; expected at least one, and one per Site")
    dictionaries = [d.to(d.decoder.dtype, model.device) for d in dictionaries]
    differences = {d.site: rank_by_difference(d, *harvests) for d in dictionaries}
    replies = replies or greedy_rows(model, suspicious.head(config.prompts), config.reply_tokens)
    baseline: dict[Site, Tensor] = {}
    for d in dictionaries:
        acts = harvests[1].load(d.site)
        baseline[d.site] = mean_activation(d, acts.tensor[acts.prompt_index != SHARED])
    attributions = rank_by_attribution(model, dictionaries, replies, baseline)
    ablations = rank_by_ablation(model, dictionaries, replies, merged(attributions)[: config.ablate])
    none = {d.site: Features(d.site, d.hash, (), (), "ablation") for d in dictionaries}
    return {s: Found(differences[s], attributions[s], ablations.get(s, none[s])) for s in differences}


@torch.no_grad()
def with_evidence(
    model: LoadedModel,
    dictionary: Coder,
    features: Features,
    suspicious: tuple[Harvest, Sequence[Sequence[int]]],
    trusted: Harvest,
    config: FindConfig = FindConfig(),
) -> Features:
    """The features with evidence for each.

    `suspicious` is the harvest and its token rows (`harvest.token_rows`).
    """
    ids = torch.tensor(features.ids, dtype=torch.long)
    dictionary = dictionary.to(dictionary.decoder.dtype, model.device)
    harvest, rows = suspicious
    acts = harvest.load(dictionary.site)
    strengths = activations_of(dictionary, acts.tensor, ids)
    ordinary = trusted.load(dictionary.site).tensor
    trusted_rates = (activations_of(dictionary, ordinary, ids) > 0).float().mean(0)
    positions = harvest.positions()
    read = logit_lens(model, dictionary.decoder[ids].float(), PROMOTED)
    evidence: dict[int, FeatureEvidence] = {}
    for column, feature in enumerate(features.ids):
        strength = strengths[:, column]
        own = acts.prompt_index != SHARED
        firing = acts.prompt_index[own & (strength > 0)].unique()
        contexts: list[tuple[tuple[str, ...], tuple[float, ...]]] = []
        seen: set[int] = set()
        for token in torch.where(own, strength, -1).argsort(descending=True).tolist():
            prompt = int(acts.prompt_index[token])
            if float(strength[token]) <= 0 or len(contexts) == config.contexts:
                break
            if prompt in seen:
                continue
            seen.add(prompt)
            here = acts.prompt_index == prompt
            by_position = dict(zip(positions[here].tolist(), strength[here].tolist(), strict=True))
            centre = int(positions[token])
            start = max(0, min(centre - config.window // 2, len(rows[prompt]) - config.window))
            span = range(start, min(start + config.window, len(rows[prompt])))
            words = tuple(model.spell(rows[prompt][p]) for p in span)
            contexts.append((words, tuple(round(by_position.get(p, 0.0), 3) for p in span)))
        up, down = (tuple(word for word, _ in end) for end in read[column])
        rate = len(firing) / max(1, int(acts.prompt_index.max()) + 1)
        evidence[feature] = FeatureEvidence(tuple(contexts), up, down, rate, float(trusted_rates[column]))
    return replace(features, evidence=evidence)


def activations_of(dictionary: Coder, x: Float[Tensor, "token d_model"], ids: Tensor) -> Float[Tensor, "token chosen"]:
    """Activations of a few features on many tokens."""
    place = torch.full((dictionary.n_features,), len(ids), dtype=torch.long)
    place[ids] = torch.arange(len(ids))
    out = torch.zeros(len(x), len(ids) + 1)
    for part, code in dictionary.encode_in_pieces(x):
        out[part].scatter_reduce_(1, place[code.ids], code.values, "amax")
    return out[:, :-1]
