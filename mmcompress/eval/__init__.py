"""What a reducer costs in accuracy, measured."""

from .pico import ALL_TOKENS, Question, Row, evaluate, questions, write_csv
from .stats import paired, wilson

__all__ = ["ALL_TOKENS", "Question", "Row", "evaluate", "paired", "questions", "wilson", "write_csv"]
