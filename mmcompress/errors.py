"""Errors that are worth catching by name; every other refusal is a plain ValueError."""


class SignalError(RuntimeError):
    """A reducer asked for a signal, such as [CLS] attention, that this model or this call cannot give."""


class WrapError(RuntimeError):
    """A model is wrapped twice, or something else wrapped it in between."""


class UnsupportedModelError(ValueError):
    """There is no adapter for this model, or the installed transformers lacks what the adapter needs."""


class VideoError(ValueError):
    """A video file cannot be read as asked: missing, damaged, no video in it, or a range or count that it does not have."""


class AudioError(ValueError):
    """A sound cannot be read or taken as asked: missing, damaged, no audio in it, a range it lacks, or an unknown rate."""
