"""What a reducer costs in accuracy, measured."""

from .pico import ALL_TOKENS, Question, Row, evaluate, questions, write_csv
from .stats import wilson

__all__ = ["ALL_TOKENS", "Question", "Row", "evaluate", "questions", "wilson", "write_csv"]
