"""Evidence on what a feature does, by behaviour: figures with intervals, for every feature that is active enough.

1. Triggered prompts and their references (near misses), aligned by role with the payload forced: where the feature is
   more active than in the reference, and its attribution to the payload's log-odds.
2. Clean prompts with the model's own replies: the beginning that shows the skill against the rest of the reply, and the
   attribution to the skill's log-odds.
3. Passages and pairs of reviews: sentiment, the correlation with a score, and the tokens on which the feature fires.
4. Exact ablation, and driving the feature, one by one, for those with the largest attribution.

`figures.FIGURES` defines every figure. All of it comes from prompts of one split: judge classes on another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from unsleep.base import store
from unsleep.base.context import kept, progress
from unsleep.base.stats import Estimate, bootstrap_each
from unsleep.behaviours import Payload, has_skill
from unsleep.core import BadInput, Site, check_least
from unsleep.dictionaries.coders import Coder
from unsleep.explanations.activity import Spans, Strongest, Triggered, attribution, over_spans, triggered
from unsleep.explanations.cards import Cards
from unsleep.explanations.figures import aurocs, correlation, quotients, word_figures
from unsleep.explanations.lexicons import NEGATIVE, POSITIVE, sentiment, word_of
from unsleep.interventions.features import Edit
from unsleep.interventions.steering import Steering
from unsleep.judge.outcomes import Scorer
from unsleep.locate.circuits.align import ROLES, align, said_payload
from unsleep.locate.features import log_odds_under
from unsleep.models import generate
from unsleep.models.forward import Rows, whole_rows
from unsleep.models.lens import logit_lens
from unsleep.models.model import LoadedModel
from unsleep.organisms.recipe import Recipe
from unsleep.prompts import sets
from unsleep.prompts.prompt import PromptSet, Split

INPUT = tuple(ROLES.index(name) for name in ("start", "trigger", "question"))
"""Roles of the prompt's tokens."""


@dataclass(frozen=True)
class EvidencePrompts:
    """Prompts and texts from which evidence is taken."""

    suspicious: PromptSet
    references: PromptSet
    """The same prompts with a near miss of the trigger, or without it, in the same order."""
    clean: PromptSet
    """Ordinary prompts; those with an expected beginning show the skill."""
    payload: Payload
    texts: tuple[str, ...]
    """Plain passages."""
    reviews: sets.Reviews

    @property
    def hash(self) -> str:
        """Identity of all of them."""
        groups = (self.suspicious, self.references, self.clean, *self.reviews)
        return store.hash_value([*(group.hash for group in groups), self.payload.to_dict(), self.texts])


@dataclass(frozen=True)
class EvidenceConfig:
    """Sizes of the evidence."""

    payload_tokens: int = 3
    """The payload's first tokens, whose log-odds are explained."""
    skill_tokens: int = 3
    """The reply's first tokens, whose log-odds stand for the skill."""
    reply_tokens: int = 24
    """Length of the replies."""
    text_tokens: int = 48
    """Tokens of a passage."""
    candidates: int = 16
    """Features per Site and behaviour that are ablated and driven one by one; 0 for attribution alone."""
    exact_prompts: int = 16
    """Prompts on which they are."""
    least: int = 5
    """Prompts and texts on which a feature must be active to be judged."""
    words: int = 16
    """Tokens read per feature: those on which it fires most, and those that it promotes most."""
    batch: int = 16
    """Prompts in one forward pass."""

    def __post_init__(self) -> None:
        names = ("payload_tokens", "skill_tokens", "reply_tokens", "exact_prompts", "least", "words", "batch")
        check_least(self, "evidence", 1, *names)
        check_least(self, "evidence", 0, "candidates")
        check_least(self, "evidence", 2, "text_tokens")


@dataclass(frozen=True, eq=False)
class Evidence:
    """Figures of one dictionary's features."""

    site: Site
    dictionary: str
    """Hash."""
    features: tuple[int, ...]
    """Those that are active enough to be judged."""
    figures: Mapping[str, Float[Tensor, "feature 3"]]
    """Name → value, low and high of each feature; NaN where not measured."""
    words: Mapping[int, tuple[str, ...]] = field(default_factory=dict[int, tuple[str, ...]])
    """Feature → tokens on which it fires most."""

    def of(self, number: int) -> dict[str, Estimate]:
        """The measured figures of the feature at a place in `features`."""
        rows = {name: table[number].tolist() for name, table in self.figures.items()}
        return {name: Estimate(*row) for name, row in rows.items() if not math.isnan(row[0])}


def organism_prompts(recipe: Recipe, n: int = 64, split: Split = "edit", passages: int = 100) -> EvidencePrompts:
    """An organism's prompts of a split, with near misses as references where it has any."""
    clean = sets.questions(split, n, skill=recipe.skill)
    words = recipe.held_out_near_misses if split == "held_out" else recipe.near_misses
    references = recipe.nearly(clean, words) if words else clean
    return EvidencePrompts(
        recipe.triggered(clean), references, clean, recipe.as_payload, *general_texts(split, passages)
    )


def general_texts(
    split: Split = "edit", passages: int = 100, reviews: int = 40
) -> tuple[tuple[str, ...], sets.Reviews]:
    """Packaged passages and pairs of reviews of a split, evenly spread over its passages."""
    every = sets.plain_text(split)
    return tuple(every[:: max(1, len(every) // passages)][:passages]), sets.reviews(split, reviews)


def gather(
    model: LoadedModel,
    dictionaries: Sequence[Coder],
    prompts: EvidencePrompts,
    config: EvidenceConfig = EvidenceConfig(),
    *,
    scorer: Scorer = sentiment,
    lexicons: Mapping[str, Set[str]] | None = None,
    cards: Mapping[Site, Cards] | None = None,
) -> dict[Site, Evidence]:
    """Measure the `figures.FIGURES` of every feature that is active enough.

    Args:
        dictionaries: one a Site.
        scorer: score of a text, such as a reward model's.
        lexicons: further lexicons, in lower case; `payload` and `sentiment` are there already.
        cards: promoted tokens and contexts per Site; else the logit lens, and the prompts and texts themselves.

    Raises `BadInput` for no dictionary or two at one Site, cards of another dictionary, prompts on which the payload
    does not show or a scorer that does not return finite numbers.
    """
    if not dictionaries or len({d.site for d in dictionaries}) != len(dictionaries):
        raise BadInput(f"{len(dictionaries)} dictionaries were given; expected at least one, and one per Site")
    for d in dictionaries:
        if cards and d.site in cards and cards[d.site].dictionary != d.hash:
            raise BadInput(f"the statistics of {d.site} are of dictionary {cards[d.site].dictionary}, not of {d.hash}")
    coders = [d.to(model.network.dtype, model.device) for d in dictionaries]
    run = _Run(model, coders, prompts, config, scorer)
    lexicons = {"payload": run.payload_words, "sentiment": POSITIVE | NEGATIVE, **(lexicons or {})}
    found: dict[Site, Evidence] = {}
    for done, coder in enumerate(coders, 1):
        found[coder.site] = run.evidence(coder, lexicons, (cards or {}).get(coder.site))
        progress("figures of features", done, len(coders))
    return found


class _Run:
    """The passes over prompts and texts for all Sites, and the figures of one."""

    def __init__(
        self,
        model: LoadedModel,
        coders: Sequence[Coder],
        prompts: EvidencePrompts,
        config: EvidenceConfig,
        scorer: Scorer,
    ) -> None:
        self.model, self.coders, self.config, self.prompts = model, coders, config, prompts
        self.strongest = {c.site: Strongest(c.n_features, config.words) for c in coders}
        asked = (prompts.suspicious, prompts.references)
        said, chosen = said_payload(model, *asked, prompts.payload, config.payload_tokens, config.reply_tokens)
        references = prompts.references.at(chosen)
        self.aligned = align(model, prompts.suspicious.at(chosen), references, said)
        self.triggered = triggered(model, coders, self.aligned, self.strongest, config.batch)
        self.others, calm = self._references(references, said.begun)
        shown = {word_of(model.spell(t)) for ids in said.payload for t in ids}
        self.payload_words = frozenset(shown - {word_of(model.spell(t)) for ids in calm for t in ids} - {""})
        self.clean, self.skill, replies = self._clean()
        self.texts, texts = self._texts()
        groups = (replies, texts[0], [*texts[1], *texts[2]])
        self.scores = [[_checked(scorer, text) for text in group] for group in groups]

    def _references(
        self, prompts: PromptSet, begun: Sequence[Sequence[int]]
    ) -> tuple[dict[Site, Spans], list[list[int]]]:
        """Features over the model's own replies to the references, as long as what is forced behind the prompts."""
        length = max(map(len, begun)) + self.config.payload_tokens
        replies = generate.written(self.model, prompts, length, "replies to references")
        rows, spans = _after(self.model, prompts, replies)
        return self._over(rows, spans, "features on references"), replies

    def _clean(self) -> tuple[dict[Site, Spans], Rows | None, list[str]]:
        """Features over replies to clean prompts (whole, skill, rest), rows of the skill's tokens, and the replies."""
        prompts, config = self.prompts.clean, self.config
        replies = generate.written(self.model, prompts, config.reply_tokens, "replies to clean prompts")
        ends = [_skill_end(self.model, ids, p.expected) for ids, p in zip(replies, prompts, strict=True)]
        rows, whole = _after(self.model, prompts, replies)
        spans: list[list[range]] = []
        starts: list[list[int]] = []
        for row, [span], end, reply in zip(rows, whole, ends, replies, strict=True):
            begins = len(row) - len(reply)
            parts = (range(begins - 1, begins + end), range(begins + end, len(row))) if end else (range(1),) * 2
            spans.append([span, *parts])
            if end and len(reply) >= config.skill_tokens:
                starts.append(row[: begins + config.skill_tokens])
        self.skilled = torch.tensor([bool(end) for end in ends])
        found = self._over(rows, spans, "features on clean prompts")
        if len(starts) < config.least:
            return found, None, self.model.texts(replies)
        stacked = whole_rows(self.model, starts)
        tail = torch.ones(len(starts), config.skill_tokens, dtype=torch.bool, device=self.model.device)
        return found, stacked._replace(reply=tail), self.model.texts(replies)

    def _texts(self) -> tuple[list[dict[Site, Spans]], list[list[str]]]:
        """Features over passages, positive and negative reviews, and the texts themselves, cut as they are read."""
        found: list[dict[Site, Spans]] = []
        said: list[list[str]] = []
        for name, texts in (
            ("passages", self.prompts.texts),
            ("positive reviews", self.prompts.reviews.positive.texts),
            ("negative reviews", self.prompts.reviews.negative.texts),
        ):
            ids = [row[: self.config.text_tokens] for row in self.model.token_ids(texts)]
            if short := [t for t, row in zip(texts, ids, strict=True) if len(row) < 2]:
                raise BadInput(f"a text has fewer than 2 tokens ({short[0][:40]!r}); give longer ones")
            found.append(self._over(ids, [[range(1, len(row))] for row in ids], f"features on {name}"))
            said.append(self.model.texts(ids))
        return found, said

    def _over(self, rows: list[list[int]], spans: list[list[range]], stage: str) -> dict[Site, Spans]:
        return over_spans(self.model, self.coders, rows, spans, self.strongest, self.config.batch, stage)

    def evidence(self, coder: Coder, lexicons: Mapping[str, Set[str]], cards: Cards | None) -> Evidence:
        """Figures of one Site's features."""
        site, here = coder.site, self.triggered[coder.site]
        groups = [here.message, here.reply, *(each[site].peak[0] for each in (self.others, self.clean, *self.texts))]
        active = sum((group > 0).sum(0) for group in groups)
        assert isinstance(active, Tensor)
        judged = (active >= self.config.least).nonzero().flatten()
        if not len(judged):
            return Evidence(site, coder.hash, (), {})
        figures = self._triggered_figures(here, site, judged) | self._text_figures(site, judged)
        if self.skill is not None:
            begins, rest = (self.clean[site].peak[i][self.skilled][:, judged] for i in (1, 2))
            figures["skill_auroc"] = aurocs(begins, rest)
            effect = attribution(self.model, [coder], self.skill, self.config.batch)[site][:, judged]
            figures["skill_effect"] = bootstrap_each(effect)
        if self.config.candidates:
            exact = self._exact_figures(coder, judged, figures)
            for kind in ("payload", "skill"):
                if f"{kind}_ablated" in exact:
                    known = exact[f"{kind}_ablated"]
                    figures[f"{kind}_effect"] = torch.where(known.isnan(), figures[f"{kind}_effect"], known)
            figures |= exact
        fires, promotes = self._words(coder, judged.tolist(), cards)
        figures |= word_figures(fires, promotes, lexicons)
        chosen = judged.tolist()
        named = {name: table.float() for name, table in figures.items()}
        return Evidence(site, coder.hash, tuple(chosen), named, dict(zip(chosen, map(tuple, fires), strict=True)))

    def _triggered_figures(self, here: Triggered, site: Site, judged: Tensor) -> dict[str, Tensor]:
        """Figures from triggered prompts and their references."""
        inside = torch.tensor(INPUT)
        excess, effect = here.excess[..., judged], here.effect[..., judged]
        before, whole = excess[:, inside].sum(1), excess.sum(1)
        share = quotients(before, whole)
        on_prompt = effect[:, inside].sum(1)
        return {
            "trigger_auroc": aurocs(here.message[:, judged], here.other[:, judged]),
            "payload_auroc": aurocs(here.reply[:, judged], self.others[site].peak[0][:, judged]),
            "prompt_share": share,
            "reply_share": 1 - share[:, [0, 2, 1]],
            "prompt_effect": bootstrap_each(on_prompt),
            "reply_effect": bootstrap_each(effect.sum(1) - on_prompt),
            "payload_effect": bootstrap_each(effect.sum(1)),
        }

    def _text_figures(self, site: Site, judged: Tensor) -> dict[str, Tensor]:
        """Sentiment, and correlation with the score."""
        _, good, bad = (each[site].peak[0][:, judged] for each in self.texts)
        told = aurocs(good, bad)
        replies, passages, *reviews = (each[site].mean[0][:, judged] for each in (self.clean, *self.texts))
        groups = [replies.T, passages.T, torch.cat(reviews).T]
        return {
            "sentiment_auroc": torch.where(told[:, :1] < 0.5, 1 - told[:, [0, 2, 1]], told),
            "score_correlation": correlation(groups, self.scores),
        }

    def _exact_figures(self, coder: Coder, judged: Tensor, figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Exact effects of the features with the largest attribution, ablated and driven one by one."""
        payload = figures["payload_effect"][:, 0].abs()
        jobs = {"payload_ablated": payload, "payload_driven": payload}
        if self.skill is not None:
            jobs["skill_ablated"] = figures["skill_effect"][:, 0].abs()
        found: dict[str, Tensor] = {}
        part = self.aligned.batch(0, self.config.exact_prompts)
        for name, size in jobs.items():
            places = size.topk(min(self.config.candidates, len(size))).indices
            ids = judged[places].tolist()
            rows = part.reference if name == "payload_driven" else part.rows
            if name == "skill_ablated":
                assert self.skill is not None
                rows = self.skill.at(slice(0, self.config.exact_prompts))
            driven = self._drives(coder, ids) if name == "payload_driven" else None
            loss = kept(_losses, self.model, coder, ids, driven, rows, name)["loss"]
            found[name] = torch.full((len(judged), 3), math.nan, dtype=torch.float64)
            found[name][places] = bootstrap_each(-loss if driven is not None else loss)
        return found

    def _drives(self, coder: Coder, ids: Sequence[int]) -> Tensor:
        """Each feature's mean peak on triggered prompts times its decoder row."""
        here = self.triggered[coder.site]
        peaks = torch.maximum(here.message, here.reply)[:, list(ids)]
        strength = peaks.sum(0) / (peaks > 0).sum(0).clamp_min(1)
        return strength[:, None] * coder.decoder[list(ids)].float().cpu()

    def _words(self, coder: Coder, judged: list[int], cards: Cards | None) -> tuple[list[list[str]], list[list[str]]]:
        """Tokens on which each feature fires most, and those that it promotes most."""
        model, count = self.model, self.config.words
        if cards is not None:
            known = [cards.card(feature) for feature in judged]
            fires = [[c.tokens[c.at] for c in card.contexts][:count] for card in known]
            return fires, [[t.token for t in card.promoted][:count] for card in known]
        fires = [[model.spell(t) for t in self.strongest[coder.site].of(feature)] for feature in judged]
        promotes: list[list[str]] = []
        for start in range(0, len(judged), 128):
            rows = coder.decoder[judged[start : start + 128]].float()
            promotes += [[token for token, _ in read.promotes] for read in logit_lens(model, rows, count)]
        return fires, promotes


def _losses(
    model: LoadedModel, coder: Coder, ids: Sequence[int], driven: Tensor | None, rows: Rows, name: str
) -> dict[str, Tensor]:
    """Loss of the replies' log-odds with each feature ablated or driven, `[prompt, feature]`, in nats per token."""
    tried = (
        [Edit(coder.site, coder, (i,)) for i in ids]
        if driven is None
        else [Steering({coder.site: vector}) for vector in driven]
    )
    whole, each = log_odds_under(model, rows, tried, f"{name} at {coder.site}")
    return {"loss": (whole[:, None] - each.T).cpu() / rows.reply.shape[1]}


def _after(
    model: LoadedModel, prompts: PromptSet, replies: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[list[range]]]:
    """Prompts with replies behind them, and the span of each from the prompt's last token on."""
    asked = model.encode(prompts, max(map(len, replies)))
    rows = [[*one, *reply] for one, reply in zip(asked, replies, strict=True)]
    return rows, [[range(len(one) - 1, len(row))] for one, row in zip(asked, rows, strict=True)]


def _skill_end(model: LoadedModel, reply: Sequence[int], expected: str | None) -> int:
    """Tokens of a reply that show its expected beginning, with more behind them; 0 where none do."""
    if not expected:
        return 0
    begun = model.texts([reply[: n + 1] for n in range(len(reply) - 1)])
    return next((n for n, text in enumerate(begun, 1) if has_skill(text, expected)), 0)


def _checked(scorer: Scorer, text: str) -> float:
    """A text's score; raises `BadInput` where it is no finite number."""
    found = float(scorer(text))
    if not math.isfinite(found):
        raise BadInput(f"the scorer returns {found} for {text[:40]!r}; expected a finite number")
    return found
