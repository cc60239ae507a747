"""From espeak's names of English phonemes to the 39 of ARPAbet, as the CMU dictionary has them, and SIL.

The label is the phoneme that the word has, not the sound that the voice makes of it: "my" is M AY in every accent. Stress and
length are dropped, and the schwa is AH. What espeak plays as one sound of two phonemes ("ar" of an American "dark", "le" of
"table", "en" of "beaten", "ie" of "quiet") is cut in the middle: those boundaries, and only those, are ours.
"""

from __future__ import annotations

SILENCE = "SIL"
PHONEMES = ("AA", "AE", "AH", "AO", "AW", "AY", "B", "CH", "D", "DH", "EH", "ER", "EY", "F", "G", "HH", "IH", "IY", "JH", "K",
            "L", "M", "N", "NG", "OW", "OY", "P", "R", "S", "SH", "T", "TH", "UH", "UW", "V", "W", "Y", "Z", "ZH")
STOPS = frozenset(("B", "CH", "D", "G", "JH", "K", "P", "T"))

_SAME = {
    "_": "SIL", "_:": "SIL",
    "a": "AE", "aa": "AE", "A:": "AA", "0": "AA", "O:": "AO", "O2": "AO", "V": "AH", "@": "AH", "@2": "AH", "@-": "AH",
    "a#": "AH", "3:": "ER", "IR": "ER", "VR": "ER", "E": "EH", "I": "IH", "I2": "IH", "I#": "IH", "i": "IY", "i:": "IY",
    "U": "UH", "u:": "UW", "aI": "AY", "aI2": "AY", "aU": "AW", "eI": "EY", "oU": "OW", "OI": "OY",
    "b": "B", "d": "D", "g": "G", "p": "P", "t": "T", "t2": "T", "t#": "T", "t[": "T", "?": "T", "k": "K", "x": "K",
    "tS": "CH", "dZ": "JH",
    "f": "F", "v": "V", "T": "TH", "D": "DH", "s": "S", "z": "Z", "S": "SH", "Z": "ZH", "h": "HH",
    "m": "M", "n": "N", "N": "NG", "l": "L", "r": "R", "r-": "R", "j": "Y", "w": "W", "w#": "W",
    "@L": "AH L", "n-": "AH N", "aI@": "AY AH", "aI3": "AY ER", "i@": "IY AH",
}
_COLOURED = {"A@": "AA", "O@": "AO", "o@": "AO", "e@": "EH", "i@3": "IH", "U@": "UH"}      # an R follows where it is spoken
_RHOTIC = {"en-us": frozenset(_COLOURED), "en-gb-scotland": frozenset(("U@",))}
_SCHWAR = ("en-us", "en-gb-scotland")                                                       # "3" of "letter" is ER, else AH
_NOTHING = ("", ";")                                                                        # a mark on the phoneme before


def phonemes(name: str, following: str, accent: str) -> tuple[str, ...]:
    """The ARPAbet of one of espeak's phonemes: none if it is a mark on the one before, two if it is heard as two.

    name       espeak's, with or without its marks of stress
    following  the next one's
    accent     the voice without its variant, such as "en-us"

    Raises KeyError for a name that no English voice has.
    """
    name, following = name.lstrip("',%=|"), following.lstrip("',%=|")
    if name in _NOTHING:
        return ()
    if name == "3":
        return ("ER",) if accent in _SCHWAR else ("AH",)
    if name == "i@" and following in ("r", "r-"):
        return ("IH",)                                                                      # "zero", not "curious"
    if name in _COLOURED:
        spoken = name in _RHOTIC.get(accent, ()) and following not in ("r", "r-")
        return (_COLOURED[name], "R") if spoken else (_COLOURED[name],)
    return tuple(_SAME[name].split())
