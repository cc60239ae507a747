"""What the tests of the KV cache's ops share: where they run, which twins there are, outputs poisoned with NaN."""

from importlib.util import find_spec

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("torch", "triton") if find_spec("triton") else ("torch",)
needs_triton = pytest.mark.skipif(len(BACKENDS) == 1, reason="Triton is not installed")


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs start as NaN, codes as 255, so a place that no kernel wrote shows."""
    plain = torch.empty

    def empty(*args, **kwargs):
        out = plain(*args, **kwargs)
        return out if out.device.type == "meta" else out.fill_(torch.nan if out.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", empty)
