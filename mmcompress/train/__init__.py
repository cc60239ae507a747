"""Training with fewer image tokens: schedules, what attaches them, the consistency loss, and pico's recipe."""

from .losses import Consistency, answer_kl, consistency
from .schedule import PRESETS, Schedule, Stage
from .staged import StagedCompression

__all__ = ["PRESETS", "Consistency", "Schedule", "Stage", "StagedCompression", "answer_kl", "consistency"]
