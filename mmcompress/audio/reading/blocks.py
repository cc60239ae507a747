"""What a backend promises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Block = NDArray[np.float32]             # (n, channels), full scale is -1 ... 1


class Damaged(Exception):
    """What comes next cannot be decoded. The message is the reason."""


class Backend(Protocol):
    """An open file.

    rate      samples per second
    channels  how many
    length    samples of one channel, None if not known (yet): it is once `blocks` came to the end
    """

    rate: int
    channels: int
    length: int | None

    def blocks(self, first: int, stop: int | None) -> Iterator[Block]:
        """The samples from `first` until before `stop`, or to the end of the file; Damaged where they break off."""

    def close(self) -> None: ...
