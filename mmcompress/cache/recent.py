"""The most recent tokens: the baseline without attention sinks."""

from __future__ import annotations

from dataclasses import dataclass

from .streaming_llm import StreamingLLM


@dataclass(frozen=True)
class Recent(StreamingLLM):
    """Keep the last tokens alone (baseline)."""

    sinks: int = 0
