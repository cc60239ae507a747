"""What a reducer costs in accuracy, measured."""

from .clips import CONTROLS, clip_questions, evaluate_clips
from .pico import ALL_TOKENS, Question, Row, evaluate, questions, write_csv
from .stats import paired, wilson

__all__ = ["ALL_TOKENS", "CONTROLS", "Question", "Row", "clip_questions", "evaluate", "evaluate_clips", "paired", "questions",
           "wilson", "write_csv"]
