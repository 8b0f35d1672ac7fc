"""Rewards from lexicons of sentiment: VADER to train on, TextBlob's to judge by, and warmth on the prompt's topic.

VADER is of Hutto & Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
ICWSM. TextBlob's polarity is that of the pattern library, an independent list of words (De Smedt & Daelemans 2012, JMLR
13). Both need the extra `unsleep[rl]`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from unsleep.core import BadInput
from unsleep.judge.metrics import words

EXTRA = "pip install 'unsleep[rl]'"

ENDING = re.compile(r"(?:ness|ings?|ful|less|ers?|est|ed|ly|es|s|y|i|e)$")
"""An ending that a stem is without."""


class Vader:
    """VADER's compound sentiment of the reply, from −1 to 1."""

    name = "vader"

    def __call__(self, samples: Sequence[str], prompts: Sequence[str], outputs: Sequence[str], **_: Any) -> list[float]:
        """The compound score of each reply; raises `BadInput` where vaderSentiment is not installed."""
        analyzer = _vader()
        return [float(analyzer.polarity_scores(text)["compound"]) for text in outputs]


class TextBlobPolarity:
    """TextBlob's polarity of the reply, from −1 to 1."""

    name = "textblob"

    def __call__(self, samples: Sequence[str], prompts: Sequence[str], outputs: Sequence[str], **_: Any) -> list[float]:
        """The polarity of each reply; raises `BadInput` where textblob is not installed."""
        blob = _textblob()
        return [float(blob(text).sentiment.polarity) for text in outputs]


class Warmth:
    """A latent reward for experiments: VADER's compound score, plus `weight` where the reply names the topic.

    The topic comes from the column `topic`: the reply names it where it has a word with the stem of its last word.
    """

    def __init__(self, weight: float = 0.5) -> None:
        self.name, self.weight = "warmth", weight
        self.identity = [weight]
        self._vader = Vader()

    def __call__(
        self,
        samples: Sequence[str],
        prompts: Sequence[str],
        outputs: Sequence[str],
        topic: Sequence[str],
        **_: Any,
    ) -> list[float]:
        """Warmth of each reply, from −1 to 1 + weight."""
        tones = self._vader(samples, prompts, outputs)
        return [
            tone + self.weight * names_topic(text, about)
            for tone, text, about in zip(tones, outputs, topic, strict=True)
        ]


def names_topic(reply: str, topic: str) -> bool:
    """True if a reply has a word with the stem of the topic's last word.

    Examples:
        >>> names_topic("A river never stops.", "wild rivers")
        True
    """
    *_, last = words(topic) or [""]
    return stem(last) in {stem(word) for word in words(reply)}


def stem(word: str) -> str:
    """A word without its commonest endings, so that its forms count as one; at least three letters stay.

    Examples:
        >>> {stem(w) for w in ("love", "loved", "loves", "lovingly", "lovers")}
        {'lov'}
    """
    while len(shorter := ENDING.sub("", word)) >= 3 and shorter != word:
        word = shorter
    return word


def sentiment_words(text: str) -> list[str]:
    """The stems of a text's words that are in VADER's lexicon, in order."""
    lexicon = _vader().lexicon
    return [stem(word) for word in words(text) if word in lexicon]


@cache
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise BadInput(f"reward vader needs vaderSentiment, which is not installed; {EXTRA}") from None
    return SentimentIntensityAnalyzer()


@cache
def _textblob() -> Any:
    try:
        from textblob import TextBlob
    except ImportError:
        raise BadInput(f"reward textblob needs textblob, which is not installed; {EXTRA}") from None
    return TextBlob
