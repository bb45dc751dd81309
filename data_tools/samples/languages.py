"""Guesses a caption's language: from its script, and for Latin letters from its most common function words.

Meant for an overview of a dataset, where errors average out over thousands of captions; short captions without function
words are "latin, unclear".
"""

from __future__ import annotations

import re

_SCRIPTS = {
    "cyrillic": "Ѐ-ԯ",
    "greek": "Ͱ-Ͽ",
    "hebrew": "֐-׿",
    "arabic": "؀-ۿݐ-ݿ",
    "devanagari": "ऀ-ॿ",
    "bengali": "ঀ-৿",
    "tamil": "஀-௿",
    "thai": "฀-๿",
    "korean": "ᄀ-ᇿ가-힣",
    "japanese": "぀-ヿ",
    "chinese": "㐀-鿿",
    "georgian": "Ⴀ-ჿ",
    "armenian": "԰-֏",
}
_LETTERS = {name: re.compile(f"[{ranges}]") for name, ranges in _SCRIPTS.items()}
_LATIN = re.compile("[A-Za-zÀ-ɏḀ-ỿ]")
_ASCII = re.compile(r"[\x00-\x7f]*")

_SMALL_WORDS = {
    "english": "the a an of in on with and is are at by for to from that this his her their it as two",
    "german": "der die das und ein eine einen einem mit auf im von den dem ist zu für vor sich nicht am beim",
    "french": "le la les un une des et de du dans sur avec est au aux en qui pour par ses",
    "spanish": "el la los las un una y de en con del al es por para que se su sobre",
    "italian": "il lo la gli un una e di del della in con su che per sono è nel dei",
    "portuguese": "o a os as um uma e de do da em com no na que para por ao dos",
    "dutch": "de het een en van in op met is te voor aan die bij zijn naar op uit",
    "polish": "i w z na do się jest nie przez dla od po za pod obok",
    "turkish": "bir ve ile için bu da de üzerinde olan gibi çok",
    "indonesian": "yang di dan dengan sebuah untuk dari ini pada seorang ke",
    "vietnamese": "và của một là có trong với trên những người",
    "swedish": "en ett och på med i av är för till som den det vid",
}
_WORDS: dict[str, list[str]] = {}
for _language, _words in _SMALL_WORDS.items():
    for _word in set(_words.split()):
        _WORDS.setdefault(_word, []).append(_language)
_TOKEN = re.compile(r"[^\W\d_]+")


def guess_language(text: str) -> str:
    """A language or script, "latin, unclear", or "no letters"."""
    if not _ASCII.fullmatch(text):
        counts = {name: len(pattern.findall(text)) for name, pattern in _LETTERS.items()}
        name = max(counts, key=lambda script: counts[script])
        if counts["japanese"]:  # kana beside Chinese characters
            counts["japanese"] += counts["chinese"]
            name = "japanese" if name == "chinese" else name
        if counts[name] > len(_LATIN.findall(text)):
            return name
    if not _LATIN.search(text):
        return "no letters"
    votes: dict[str, float] = {}
    for word in _TOKEN.findall(text.lower()):
        languages = _WORDS.get(word, ())
        for language in languages:
            votes[language] = votes.get(language, 0.0) + 1 / len(languages)
    top = max(votes.values(), default=0.0)
    best = [language for language, vote in votes.items() if vote == top]
    return best[0] if len(best) == 1 else "latin, unclear"
