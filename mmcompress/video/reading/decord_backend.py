"""Reading by decord, where its result can be vouched for: whole mp4 and mov files with closed groups of pictures.

decord counts frames instead of looking at their timestamps. Measured with 0.6.0 and decord2 3.4.0, it returns wrong frames
without a word from MPEG-TS, from trimmed files (edit lists), and where B-frames reach over a keyframe (open groups, the default
of x265); and it calls what is left of a damaged file the whole. So its frame table is compared with the file's own first. It
also fails now and then on whole HEVC files ("Error sending packet", -11: it takes one frame a packet).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .index import Doubt, Frame, Index, Positions, Undecodable, first_line, fit
from .iso import Movie, Track

HEVC = ("hvc1", "hev1", "dvh1", "dvhe")
NO_DUPLICATES = 1e-9    # share of frames that decord may replace by their neighbours before it fails; 0 would switch that off


class Decord:
    """An open file; `movie` is its index if it is an mp4.

    Raises Doubt for files that decord would misread.
    """

    def __init__(self, path: Path, movie: Movie | None, decord: Any):
        track = plain_track(movie)
        self.decord, self.path = decord, path
        duplicates = decord._ffi.base.DECORDLimitReachedError
        self.errors = (decord.DECORDError, duplicates, RuntimeError, AssertionError, StopIteration)
        self.reader = self._open()
        self.index = self._index(track)

    def _open(self, **size: int) -> Any:
        try:
            self.at = -1                                            # the position of the frame that next() gives; unknown
            return self.decord.VideoReader(str(self.path), num_threads=0, fault_tol=NO_DUPLICATES, **size)
        except self.errors as e:
            raise Doubt(f"cannot be opened by decord ({first_line(e)})", True) from e

    def close(self) -> None:
        self.reader = None                                          # its destructor closes the file

    def _index(self, track: Track) -> Index:
        pts, keys = track.pts, np.asarray(self.reader.get_key_indices(), dtype=np.int64)     # keys: in the order of decoding
        order = np.sort(pts)
        seconds = (order - order[0]) / track.timescale
        if len(self.reader) != len(pts):
            raise Doubt(f"has {len(pts)} frames of which decord finds {len(self.reader)}", True)
        spans = self.reader.get_frame_timestamp(range(len(pts)))    # (N, 2) float32
        if np.abs(spans[:, 0] - seconds).max() > max(1e-3, 2e-7 * seconds[-1]):
            raise Doubt("has an edit list, and decord reads what it cuts away", True)
        if not closed(pts, keys):
            raise Doubt("has B-frames that reach over keyframes (open groups of pictures), which decord misplaces", True)
        end = float(seconds[-1] + spans[-1, 1] - spans[-1, 0])
        return Index(seconds, keys, end, declared=end)              # closed groups: decoding and showing have the same keys

    def frames(self, positions: Positions, size: tuple[int, int] | int | None) -> Iterator[Frame]:
        if size is not None:
            if not isinstance(size, tuple):
                size = fit(self._frame(int(positions[0])).shape, size)
            self.reader = self._open(height=size[0], width=size[1])
        for position in positions.tolist():
            yield self._frame(position)

    def _frame(self, position: int) -> Frame:
        """Decoded from its keyframe on, frame by frame.

        Never by `reader[position]` or get_batch: their skipping gives up waiting for the decoder on a busy machine, and then
        returned frames up to 58 before the wanted one (decord2 3.4.0).
        """
        key = int(self.index.keys[np.searchsorted(self.index.keys, position, side="right") - 1])
        try:
            if not key <= self.at <= position:
                self.reader.seek_accurate(key)
                self.at = key
            while self.at <= position:
                frame: NDArray[np.uint8] = self.reader.next().asnumpy()
                self.at += 1
        except self.errors as e:
            self.at = -1
            raise Undecodable(self.index, position, first_line(e)) from e
        height, width, channels = frame.shape
        if channels == 3:
            return frame
        # rows are padded: decord takes 96 RGB pixels in 384 bytes for pixels of 4 bytes, and its get_batch fails on them
        return frame.reshape(height, width * channels)[:, :3 * width].reshape(height, width, 3)


def plain_track(movie: Movie | None) -> Track:
    """The video track of a file that decord reads right as far as the file's own index can say."""
    if movie is None:
        raise Doubt("is not an mp4 or mov file, the only ones of which decord's frame table can be checked", True)
    if movie.fragmented:
        raise Doubt("is a fragmented mp4 file, of which decord's frame table cannot be checked", True)
    if movie.missing:
        raise Doubt("is cut off, and decord would take what is left for the whole", True)
    if len(movie.tracks) != 1:
        raise Doubt(f"has {len(movie.tracks) or 'no'} video tracks", len(movie.tracks) > 1)
    track = movie.tracks[0]
    if not len(track.pts) or not track.timescale:
        raise Doubt("has a video track without a single frame")
    if track.codec in HEVC:
        raise Doubt("is HEVC, on which decord fails now and then", True)
    if not track.turned:
        raise Doubt("is to be shown mirrored or turned by an odd angle, which decord ignores", True)
    length = (np.ptp(track.pts) + 1) / track.timescale
    if len(track.edits) > 1 or (track.edits and (track.edits[0] > track.pts.min() or (track.shown or length) < length - 0.01)):
        raise Doubt("has an edit list that cuts something away, which decord ignores", True)
    return track


def closed(pts: NDArray[np.int64], keys: Positions) -> bool:
    """Whether no frame is shown before a keyframe that is decoded before it; pts in the order of decoding."""
    if not len(keys) or keys[0] != 0:
        return False
    before = np.maximum.accumulate(pts)[keys[1:] - 1]               # the last that is shown of what is decoded before each
    after = np.minimum.accumulate(pts[::-1])[::-1][keys]            # the first that is shown of what is decoded from it on
    return bool((before < pts[keys[1:]]).all() and (after == pts[keys]).all())
