"""Text to hide things in: English prose of any length, made up here or read from files, and places in it."""

import hashlib
import re
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from random import Random

FIRST_NAMES = tuple(
    "Agnes Albert Bertha Cedric Clara Dorian Edith Elmer Esther Felix Flora Gilbert Greta Harold Hedwig Horace Ingrid "
    "Irma Jasper Judith Lionel Mabel Magnus Matilda Mildred Nadine Norbert Olive Oscar Petra Quentin Ralph Rosalind "
    "Rupert Sabine Silas Theodora Ursula Vernon Wanda".split()
)
SURNAMES = tuple(
    "Abernathy Ashdown Barlow Birchall Blackwood Calloway Carmody Dunmore Eastwick Fairbanks Fenwick Garland Greville "
    "Hathaway Holloway Ingleby Kestrel Lockhart Marlowe Merriden Northcott Oakley Pemberton Prescott Radcliffe Redfern "
    "Sackville Selwyn Stanhope Tarrant Thackeray Tolliver Underhill Vickery Westbrook Winslow Yardley".split()
)
ADJECTIVES = tuple(
    "amber ancient azure brass broken bronze copper crimson crooked crystal curious dusty emerald faded gilded golden "
    "hollow humble indigo iron ivory marble mossy narrow ornate painted pewter plain polished purple rusty scarlet "
    "secret silver slender striped velvet violet weathered wooden".split()
)
NOUNS = tuple(
    "anchor apple arrow barrel basket beacon bell bicycle blanket bottle bridge broom bucket button cabinet camera "
    "candle canoe carpet castle chair chimney clock coin compass cottage cradle crown cup curtain desk diary door "
    "dragon drum engine falcon feather fence fiddle flag flute forest fountain garden gate glove hammer harbour harp "
    "hat helmet island jacket journal kettle key kite ladder lantern letter library lighthouse lock lute mantle map "
    "market mask medal meadow mill mirror moon mountain needle nest oven paddle palace parcel pearl pencil pillow "
    "pitcher planet plough pocket portrait quilt raft ribbon ring river rope saddle sail scarf shell shield ship "
    "shovel spoon stable star stone stove sword table tower train trumpet tunnel umbrella valley vase village violin "
    "wagon wallet watch well wheel whistle window wing".split()
)

_WHO = tuple(
    "the baker,an old sailor,the schoolteacher,a young carpenter,the postman,the gardener,her neighbour,a travelling "
    "musician,the doctor,the widow next door,a student of law,the ferryman,the innkeeper,his cousin,the librarian,a "
    "retired judge,the shepherd,the mayor,a visitor from the coast,the blacksmith,the cook,an apprentice,the "
    "stationmaster,the twins,a painter with a limp,the night watchman".split(",")
)
_DID = tuple(
    "walked along the canal,mended the old nets,argued about the price of flour,planted a row of beans,wrote a long "
    "letter home,waited for the last tram,counted the geese twice,read the newspaper aloud,polished the brass "
    "handles,told a story nobody believed,swept the yard before breakfast,borrowed a ladder,forgot to close the "
    "gate,listened to the rain,sold a few baskets of pears,learned to play the accordion,looked for the lost "
    "cat,baked far too much bread,repaired the clock on the landing,painted the shutters green,carried water from "
    "the pump,dreamed of the sea,folded the linen,drew maps of places that do not exist".split(",")
)
_WHERE = tuple(
    "in the market square,by the river,near the old mill,at the edge of the village,behind the chapel,on the hill "
    "above the town,in a small kitchen,under the railway arch,at the end of the pier,beside the orchard,in the "
    "reading room,on the way to school,below the city wall,in the shade of the lime trees".split(",")
)
_WHEN = tuple(
    "early in the morning,late one evening,on a windy afternoon,during the first week of spring,just before the "
    "harvest,in the middle of winter,after the market had closed,while the others were asleep,on the day of the "
    "fair,long before the bridge was built,towards the end of summer,at the sound of the bells".split(",")
)
_SEEMED = tuple(
    "nobody thought it strange,it took longer than expected,the dog would not stop barking,the weather was kind for "
    "once,there was little to be said about it,some people laughed and others did not,the kettle had already gone "
    "cold,the road was still wet,it reminded everyone of better days,the children had questions,the smell of coffee "
    "filled the house,not a single boat was to be seen".split(",")
)
_FRAMES = (
    "{When}, {who} {did} {where}.",
    "{Who} {did} {where}, and {seemed}.",
    "{Seemed}, so {who} {did} instead.",
    "It was {who} who {did} {when}.",
    "While {who} {did}, {other} {did2} {where}.",
    "{Where}, {who} {did}, although {seemed}.",
    "Some say that {who} {did} {when}; others say it was {other}.",
    "{Who} {did}, then {did2}, and went home.",
    "{When} {seemed}.",
    "People still talk about how {who} {did} {where} {when}.",
    "{Who} and {other} never agreed on why somebody {did} {where}.",
    "Because {seemed}, {who} {did} once more.",
)


def prose(rng: Random) -> Iterator[str]:
    """Sentences without end, in plain English, with no digits in them."""
    while True:
        (who, other), (did, did2) = rng.sample(_WHO, 2), rng.sample(_DID, 2)
        slots = {"who": who, "when": rng.choice(_WHEN), "where": rng.choice(_WHERE), "seemed": rng.choice(_SEEMED)}
        capital = {slot.capitalize(): words[0].upper() + words[1:] for slot, words in slots.items()}
        yield rng.choice(_FRAMES).format(**slots, **capital, other=other, did=did, did2=did2)


class Haystack:
    """Sentences to hide things among.

    Args:
        path: a text file, or a folder whose .txt files are read in the order of their names; empty: `prose`. A text
            that is shorter than what is asked of it starts again from its beginning.

    Raises:
        ValueError: nothing is there, or less than 50 sentences.
    """

    def __init__(self, path: str = "") -> None:
        self.own = _sentences(path) if path else ()

    @property
    def source(self) -> str:
        """SHA-256 of the text that it was given; empty where there is none."""
        return hashlib.sha256("\n".join(self.own).encode()).hexdigest() if self.own else ""

    def sentences(self, rng: Random, number: int) -> list[str]:
        """So many sentences, from a place that `rng` chooses; more of them begin with the same."""
        if not self.own:
            return list(islice(prose(rng), number))
        start = rng.randrange(len(self.own))
        return [self.own[at % len(self.own)] for at in islice(count(start), number)]


def _sentences(path: str) -> tuple[str, ...]:
    place = Path(path).expanduser()
    files = sorted(place.glob("*.txt")) if place.is_dir() else [place]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"haystack={path!r} is no text file and no folder of .txt files; give one that is there")
    found: list[str] = []
    for file in files:
        for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", file.read_text(encoding="utf-8", errors="replace")):
            words = sentence.split()
            found += (" ".join(words[at : at + 40]) for at in range(0, len(words), 40))
    if len(found) < 50:
        raise ValueError(f"haystack={path!r} has {len(found)} sentences; give a text of at least 50")
    return tuple(found)


def scatter(sentences: list[str], needles: dict[str, float]) -> str:
    """The sentences in paragraphs of six, each needle a sentence of its own at its share, in [0, 1], of the way."""
    text, places = list(sentences), sorted(needles.items(), key=lambda item: item[1], reverse=True)
    for needle, share in places:
        text.insert(round(share * len(sentences)), needle)
    return "\n\n".join(" ".join(text[at : at + 6]) for at in range(0, len(text), 6))
