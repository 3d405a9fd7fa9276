"""The words of captions, and what they mean in a picture: colours, patterns, places, sizes, spots and relations."""

from __future__ import annotations

COLOURS = {
    "black": (24, 24, 28),
    "white": (250, 250, 250),
    "grey": (140, 142, 148),
    "red": (214, 40, 44),
    "orange": (244, 136, 34),
    "yellow": (252, 212, 60),
    "green": (58, 158, 74),
    "teal": (28, 152, 152),
    "blue": (44, 98, 214),
    "sky blue": (132, 196, 244),
    "navy": (26, 36, 92),
    "purple": (128, 66, 178),
    "pink": (246, 150, 190),
    "brown": (122, 80, 48),
    "cream": (246, 234, 206),
}
# Of grounds; see `scenes._grounds`.
PATTERNS = ("plain", "fade down", "fade across", "stripes", "bars", "diagonal", "dots", "checks", "horizon", "stars")
# Patterns with the word that captions name them by.
PATTERN_WORDS = (
    ("stripes", "striped"),
    ("bars", "barred"),
    ("diagonal", "diagonally striped"),
    ("dots", "dotted"),
    ("checks", "checkered"),
)
# Places that captions name: a pattern, and its two colours.
PLACES = {
    "in the snow": ("horizon", (206, 226, 244), (252, 252, 254)),
    "on the beach": ("horizon", (120, 196, 236), (238, 214, 160)),
    "at sea": ("horizon", (168, 214, 244), (30, 88, 164)),
    "in the desert": ("horizon", (252, 226, 160), (214, 160, 90)),
    "on a meadow": ("horizon", (150, 208, 250), (98, 178, 76)),
    "in a forest": ("horizon", (70, 130, 80), (40, 84, 46)),
    "on the road": ("horizon", (196, 210, 222), (104, 106, 112)),
    "in a room": ("horizon", (248, 232, 204), (150, 100, 62)),
    "in space": ("stars", (12, 12, 34), (250, 250, 240)),
    "at sunset": ("fade down", (250, 150, 70), (116, 56, 130)),
    "under water": ("fade down", (110, 200, 226), (14, 62, 128)),
    "in the fog": ("fade down", (222, 224, 228), (176, 180, 188)),
}
# Sizes that captions name, "" for none: least and largest side of the sprite over that of the picture.
SIZES = {"small": (0.30, 0.42), "": (0.46, 0.64), "large": (0.72, 0.92)}
PAIR_SIZES = {"small": (0.26, 0.34), "": (0.40, 0.48), "large": (0.52, 0.60)}  # the same for one of two things
# Spots that captions name: x and y, from -1 to 1; y goes down.
SPOTS = {
    "in the middle": (0.0, 0.0),
    "on the left": (-1.0, 0.0),
    "on the right": (1.0, 0.0),
    "at the top": (0.0, -1.0),
    "at the bottom": (0.0, 1.0),
    "in the top left corner": (-1.0, -1.0),
    "in the top right corner": (1.0, -1.0),
    "in the bottom left corner": (-1.0, 1.0),
    "in the bottom right corner": (1.0, 1.0),
}
# Relations of two things in captions, and the centres of both.
RELATIONS = {
    "to the left of": ((-0.46, 0.0), (0.46, 0.0)),
    "to the right of": ((0.46, 0.0), (-0.46, 0.0)),
    "above": ((0.0, -0.48), (0.0, 0.46)),
    "under": ((0.0, 0.48), (0.0, -0.46)),
    "next to": ((-0.46, 0.08), (0.46, 0.0)),
    "and": ((-0.46, 0.0), (0.46, 0.05)),
    "in front of": ((-0.14, 0.34), (0.10, -0.10)),
    "behind": ((0.16, -0.30), (-0.10, 0.26)),
}


def with_article(name: str) -> str:
    """ "a bell", "an apple"; a plural stays as it is."""
    last = name.split()[-1]
    if last.endswith("s") and not last.endswith(("ss", "us", "is")):
        return name
    vowel = name[0] in "aeiou" and not name.startswith(("uni", "usb", "eu", "one "))
    return f"{'an' if vowel else 'a'} {name}"


def plural(name: str) -> str:
    """ "bells", "buses"; a plural stays as it is."""
    if with_article(name) == name:
        return name
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")
