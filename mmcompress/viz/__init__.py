"""Pictures of what was kept and of what it cost. Needs matplotlib: pip install "mmcompress[viz]"."""

from .figure import save
from .overlay import kept_maps, plot_kept
from .pareto import plot_pareto
from .sheet import contact_sheet
from .slots import plot_slots, slot_maps
from .spectrogram import plot_spans, token_rate
from .strip import frame_counts, plot_strip, strip_maps

__all__ = ["contact_sheet", "frame_counts", "kept_maps", "plot_kept", "plot_pareto", "plot_slots", "plot_spans",
           "plot_strip", "save", "slot_maps", "strip_maps", "token_rate"]
