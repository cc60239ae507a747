"""Sound files in folders, by their names; what a file holds decides `load`."""

from __future__ import annotations

import os
from pathlib import Path

SUFFIXES = frozenset((
    ".3gp", ".aac", ".aif", ".aiff", ".au", ".caf", ".flac", ".m4a", ".m4b", ".mka", ".mkv", ".mov", ".mp3", ".mp4", ".mpga",
    ".oga", ".ogg", ".opus", ".rf64", ".ts", ".w64", ".wav", ".wave", ".webm"))


def within(folder: Path) -> list[Path]:
    """The files under a folder that are named like a sound, ascending; hidden ones and links to folders are passed over.
    Raises ValueError if there is none."""
    found = sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names
                   if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{folder} holds no file that is named like a sound ({', '.join(sorted(SUFFIXES))}): pass the files "
                         "themselves, whatever their names")
    return found
