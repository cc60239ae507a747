"""What `draw` says: spoken digits, and sentences of common words in which every English phoneme occurs."""

from __future__ import annotations

import random

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

DETERMINERS = ("the", "a", "my", "your", "his", "her", "our", "their", "this", "that", "every", "each", "another",
               "one", "some")

NOUNS = (
    "apple", "army", "aunt", "azure", "baby", "bath", "beach", "bear", "bed", "bell", "bird", "boat", "book", "bottle", "boy",
    "bread", "bridge", "brother", "bus", "cake", "camera", "car", "castle", "chair", "cheese", "child", "choice", "church",
    "city", "cloth", "cloud", "coat", "coin", "collar", "corner", "cousin", "cow", "crown", "cup", "danger", "daughter", "day",
    "dinner", "doctor", "dog", "door", "dream", "dress", "driver", "earth", "egg", "engine", "evening", "eye", "face", "farm",
    "father", "feather", "finger", "fire", "fish", "flag", "floor", "flower", "fog", "foot", "forest", "friend", "fruit",
    "garage", "garden", "gate", "ghost", "giant", "girl", "glass", "glove", "gold", "goose", "ground", "hammer", "hand", "hat",
    "heart", "hill", "hook", "horse", "hotel", "house", "ice", "island", "jacket", "job", "joke", "journey", "judge", "juice",
    "king", "kitchen", "knife", "lady", "lake", "lamp", "leather", "letter", "light", "lion", "machine", "market", "measure",
    "message", "metal", "milk", "minute", "mirror", "money", "month", "moon", "morning", "mother", "mouse", "mouth", "music",
    "nation", "needle", "nephew", "night", "noise", "north", "number", "ocean", "office", "oil", "onion", "page", "paper",
    "park", "path", "pencil", "picture", "pillow", "pleasure", "pocket", "poison", "pudding", "purple", "queen", "question",
    "rain", "ring", "river", "road", "roof", "room", "salt", "school", "scissors", "sea", "shadow", "sheep", "shirt", "shoe",
    "shop", "silver", "sister", "smoke", "snow", "soap", "song", "south", "spoon", "spring", "stone", "storm", "street",
    "sugar", "summer", "sun", "table", "tea", "teacher", "television", "thief", "thing", "thumb", "thunder", "ticket", "tiger",
    "tooth", "tower", "town", "toy", "train", "treasure", "tree", "truth", "uncle", "union", "valley", "vegetable", "village",
    "violin", "vision", "voice", "wagon", "wall", "watch", "water", "weather", "wheel", "wife", "wind", "window", "winter",
    "witch", "wolf", "woman", "wood", "world", "worm", "yard", "year", "zebra", "zoo",
)

ADJECTIVES = (
    "angry", "bad", "big", "black", "blue", "brave", "bright", "broken", "brown", "busy", "casual", "cheap", "clean", "clever",
    "cold", "cool", "curious", "dark", "deaf", "deep", "dirty", "dry", "early", "easy", "empty", "fair", "famous", "fast",
    "foolish", "free", "fresh", "full", "funny", "gentle", "good", "great", "green", "happy", "hard", "heavy", "high", "hollow",
    "huge", "hungry", "kind", "large", "late", "lazy", "little", "long", "loud", "lucky", "modern", "narrow", "new", "nice",
    "noisy", "odd", "old", "orange", "other", "poor", "proud", "pure", "quick", "quiet", "rare", "red", "rich", "rough",
    "royal", "short", "shy", "sick", "slow", "small", "smooth", "soft", "sour", "strange", "strong", "sweet", "tall", "thick",
    "thin", "tiny", "tired", "usual", "warm", "weak", "wet", "white", "whole", "wide", "wild", "wise", "wrong", "yellow",
    "young",
)

VERBS = (
    "asked", "believed", "borrowed", "bought", "broke", "brought", "built", "burned", "called", "carried", "caught", "changed",
    "chased", "chose", "cleaned", "closed", "covered", "crossed", "described", "drew", "enjoyed", "feared", "felt", "filled",
    "followed", "forgot", "found", "gave", "guarded", "heard", "held", "hid", "joined", "kept", "knew", "left", "liked", "lost",
    "loved", "made", "measured", "met", "missed", "moved", "needed", "noticed", "offered", "opened", "painted", "pulled",
    "pushed", "put", "reached", "remembered", "said", "saw", "shook", "showed", "shut", "sold", "stole", "stopped", "studied",
    "surprised", "taught", "thanked", "threw", "took", "touched", "used", "visited", "wanted", "washed", "watched", "wished",
    "wore", "wrote",
)

PLACES = ("above", "across", "after", "against", "around", "before", "behind", "below", "beside", "between", "beyond", "by",
          "down", "for", "from", "in", "inside", "near", "on", "over", "past", "round", "through", "towards", "under", "up",
          "with", "without")

ADVERBS = ("again", "always", "badly", "early", "easily", "gladly", "hardly", "never", "now", "often", "once", "quickly",
           "quietly", "really", "sadly", "seldom", "slowly", "soon", "suddenly", "then", "there", "today", "together", "twice",
           "usually", "well", "yesterday")

VOCABULARY = tuple(dict.fromkeys((*DETERMINERS, *ADJECTIVES, *NOUNS, *VERBS, *PLACES, *ADVERBS)))


def digits(rng: random.Random, low: int, high: int) -> str:
    """From `low` to `high` digits as words."""
    return " ".join(rng.choice(DIGITS) for _ in range(rng.randint(low, high)))


def sentence(rng: random.Random) -> str:
    """6 to 12 words: who did what, and perhaps where and how. Grammatical, senseless, without a comma."""
    def thing(most: int) -> list[str]:
        return [rng.choice(DETERMINERS), *rng.sample(ADJECTIVES, rng.randint(0, most)), rng.choice(NOUNS)]

    words = [*thing(1), rng.choice(VERBS), *thing(1)]                   # 5 to 7
    if len(words) == 5 or rng.random() < 0.7:
        words += [rng.choice(PLACES), *thing(1)]                        # and 3 or 4
    if rng.random() < 0.3:
        words.append(rng.choice(ADVERBS))
    return " ".join(words)
