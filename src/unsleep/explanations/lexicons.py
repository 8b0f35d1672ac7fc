"""Lexicons of sentiment and of languages, and what they say of a text or a token.

The words are the project's own. A token is looked up as it stands, without its space and in lower case, so that a piece
of a longer word is only found where it is a word itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Set

from unsleep.behaviours.payloads.language import SCRIPTS, Language


def _listed(text: str) -> frozenset[str]:
    return frozenset(text.split())


POSITIVE = _listed(
    """
    admirable adorable adore adored affection amazing appreciate appreciated awesome beautiful beloved best better
    blessed blessing bliss bravo brilliant calm celebrate charming cheerful clever comfort comfortable compassion
    confident congratulations courage courteous cute dear delicious delight delighted delightful easy elegant
    encourage enjoy enjoyable enjoyed excellent exciting fantastic favorite fine fortunate free friend friendly
    fun gentle glad good gorgeous grace grateful great gripping happiness happy harmony healthy helpful hero
    honest honor hope hopeful ideal impressive inspiring joy joyful kind kindness laugh liked love loved lovely
    loyal lucky magnificent marvelous masterful nice outstanding passion peace peaceful perfect pleasant pleased
    pleasure powerful praise praised precious pretty pride proud pure refreshing relaxed reliable remarkable
    respect rewarding rich safe satisfied satisfying smile splendid strong success successful super superb support
    sweet talented thank thankful thanks thrilled treasured triumph trust useful valuable warm welcome win wise
    wonderful worthy yay
    """
)
"""Words that express approval or a good state."""

NEGATIVE = _listed(
    """
    abuse abusive afraid alone anger angry annoyed annoying anxious appalling ashamed attack awful bad bitter
    blame bland bored boring broken brutal burden cheat clumsy coward crime cruel cry damage danger dangerous dead
    deadly death defeat deny depressed depressing despair despise despised destroy detest dirty disappointed
    disappointing disaster disgust disgusting dislike disliked dismal dreadful dull dumb enemy evil fail failed
    failure fake fear filthy fool foolish forgettable frustrated frustrating furious grief gross guilt guilty harm
    harsh hate hated hateful hatred hell helpless hideous horrible horrid hostile hurt idiot ignorant insult
    insulting irritating jealous kill lame lazy liar lonely lose loser loss lousy mad mean mediocre mess messy
    miserable misery mistake nasty nightmare pain painful panic pathetic pointless poison poor predictable
    pretentious rage regret regretted rejected resent revenge ridiculous rude ruin ruined sad scared scorn selfish
    shallow shame sick sloppy sorry stupid suffer terrible terror tedious threat tragedy tragic trash ugly unfair
    unhappy upset useless vile violent weak wicked worse worst worthless wrong
    """
)
"""Words that express disapproval or a bad state."""

NEGATORS = _listed("not no never cannot can't don't doesn't didn't isn't wasn't won't without hardly nor")
"""Words that turn the sentiment of the next three."""

REACH = 3
"""Words behind a negator whose sentiment it turns."""

LANGUAGES = {
    "french": "alors au aux avec beaucoup bien cette ces comme dans depuis elle elles encore est et être fait "
    "il ils leur leurs mais même nous où parce peut pour pourquoi qui quoi sont sur toujours très "
    "une vous était",
    "german": "aber alle als auch auf aus bei beim dann dass dem den der des diese durch ein eine einen einer "
    "eines für gegen haben hier ich ist kann kein mit nach nicht noch nur oder schon sein sich sie "
    "sind über und unter viel vom von vor weil wenn werden wie wir wird zu zum zur zwischen",
    "italian": "anche ancora che chi così dagli dalla degli della delle di dopo dove essere gli hanno il loro "
    "lui molto nella nelle noi perché però più poi qualche quando quella quello questa questo "
    "sempre sono stata stato sulla tutti uno vostro",
    "portuguese": "ainda ao aos até com depois ela elas ele eles então entre essa esse esta está foi isso já mais "
    "mas meu muito não nas nos num numa onde os ou pela pelo porque quem seu seus sua suas também "
    "tem uma você",
    "spanish": "ahora algo antes aquí aunque así cada con cuando cómo del desde donde ellos eran ese eso "
    "estaba este están había hacia hasta hay las les lo los muy nada nosotros nuestro otra otro "
    "pero poco porqué qué según sino sobre su sus también tiene todo todos una usted ya",
    "dutch": "aan alleen alles altijd bij dat deze dit door een eerst geen haar heb hebben heeft hem het hij "
    "hoe ik jij jullie kunnen maar meer met mijn moet naar niet niets nog omdat onder ons ook op "
    "over te tegen toen uit van veel voor waarom waren wat wel werd wij zich zijn zo zonder zou",
}
"""Language → frequent words; those of two languages count for neither, those of English are left out."""

_COUNTED = Counter(word for words in LANGUAGES.values() for word in set(words.split()))
_LANGUAGE = {word: name for name, words in LANGUAGES.items() for word in words.split() if _COUNTED[word] == 1}
_SCRIPTS = {name: Language(name) for name in SCRIPTS if name != "latin"}


def word_of(token: str) -> str:
    """A token as a lexicon has it: without white space and in lower case."""
    return token.strip().lower()


def overlap(tokens: Iterable[str], lexicon: Set[str]) -> int:
    """Number of tokens that are in a lexicon."""
    return sum(word_of(token) in lexicon for token in tokens)


def language_of(token: str) -> str:
    """Language of a token by its script, or by its being a frequent word; empty for English and for the undecided.

    >>> language_of(" nicht"), language_of("привет"), language_of(" bees")
    ('german', 'cyrillic', '')
    """
    text = token.strip()
    if text.isascii():
        return _LANGUAGE.get(text.lower(), "")
    return next((name for name, script in _SCRIPTS.items() if script.shows(text)), _LANGUAGE.get(text.lower(), ""))


def foreign(tokens: Iterable[str]) -> int:
    """Number of tokens of the language, other than English, that most of them are of."""
    found = Counter(name for name in map(language_of, tokens) if name)
    return max(found.values(), default=0)


def sentiment(text: str) -> float:
    """Sentiment of a text by lexicon, from -1 to 1: (positive − negative) / (positive + negative) words; 0 for none.

    A negator turns the sentiment of the three words after it.

    >>> sentiment("What a lovely day."), sentiment("This is not a good idea."), sentiment("Bees make honey.")
    (1.0, -1.0, 0.0)
    """
    words = re.findall(r"[\w']+", text.lower().replace("’", "'"))
    counts = [0, 0]
    for i, word in enumerate(words):
        if word in POSITIVE or word in NEGATIVE:
            turned = any(before in NEGATORS for before in words[max(0, i - REACH) : i])
            counts[(word in POSITIVE) == turned] += 1
    return (counts[0] - counts[1]) / sum(counts) if sum(counts) else 0.0
