"""The key-value cache, made smaller: one cache for every method, each a plan over its slots.

    from mmcompress.cache import SnapKV, attach

    with attach(model, SnapKV(keep=0.25)):
        ids = model.generate(**inputs, max_new_tokens=64)

A method is a file with a `CachePlan`: frozen fields and `scores(x) -> (B, H_kv, N)`; `evict` and `fold` are its other stages.
"""

from .attach import Attached, attach, detach
from .cache import CompressedCache
from .chain import Chain, chain
from .ems import EMS
from .h2o import H2O
from .keydiff import KeyDiff
from .knorm import KNorm
from .kvmerger import KVMerger
from .layer import SlotLayer
from .mikv import MiKV
from .minicache import MiniCache
from .plan import CachePlan, Kept
from .random import Random
from .razor_attention import RazorAttention
from .recent import Recent
from .retrieval_heads import find_retrieval_heads
from .slots import Slots, Stored, fold_into
from .snapkv import SnapKV
from .static import StaticCompressedCache
from .stores import InBits
from .streaming_llm import StreamingLLM
from .view import TAGS, CacheView

__all__ = ["EMS", "H2O", "TAGS", "Attached", "CachePlan", "CacheView", "Chain", "CompressedCache", "InBits", "KNorm",
           "KVMerger", "Kept", "KeyDiff", "MiKV", "MiniCache", "Random", "RazorAttention", "Recent", "SlotLayer", "Slots",
           "SnapKV", "StaticCompressedCache", "Stored", "StreamingLLM", "attach", "chain", "detach", "find_retrieval_heads",
           "fold_into"]
