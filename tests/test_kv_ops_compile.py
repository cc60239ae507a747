"""Every Triton kernel compiles to an H100's machine code, without a GPU: the interpreter lets pass what a compiler may not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kv_ops import needs_triton

# Runs without the interpreter, in a process of its own: launches are caught, and what would be launched is compiled.
SCRIPT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8", torch.int32: "i32"}
done = set()

def launch(self, *args, grid, warmup, **options):
    signature, constants = {}, {}
    for i, name in enumerate(self.arg_names):
        value = options.get(name, args[i] if i < len(args) else None)
        if self.params[i].is_constexpr or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + NAMES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    key = (self.__name__, str(signature), str(constants))
    if key not in done:
        done.add(key)
        built = compile(ASTSource(self, signature, constants), target=GPUTarget("cuda", 90, 32))
        assert built.asm["cubin"] and built.metadata.shared <= 227 * 1024
        print(self.__name__)

JITFunction.run = launch
from mmcompress.ops.kv_decode import Slots
from mmcompress.ops.kv_quant import quantize
from mmcompress.ops.kv_scores import prepare
from mmcompress.ops.triton import kv_decode, kv_keys, kv_quant, kv_scores

q, k = torch.randn(1, 4, 64, 32).bfloat16(), torch.randn(1, 2, 64, 32).bfloat16()
valid = torch.ones(1, 2, 64, dtype=torch.bool)
kv_scores.column_sums(q, k, prepare(q, k, None, valid, None, None, None, True, None, "sum"), None)
kv_keys.key_norm(k, valid)
kv_keys.key_diversity(k, None)
kv_quant.quantize(k, 4, (1, 16), None, torch.float16)
kv_quant.quantize(k, 2, (32, 1), valid, torch.bfloat16)
low = Slots(quantize(k, 4, "channel", 32, kernel="torch"), quantize(k, 2, kernel="torch"), valid=valid, bias=valid.float(),
            lengths=torch.ones(1, 2, dtype=torch.int32), balance=torch.ones(1, 2, 1, 32))
kv_decode.decode_attention(q[:, :, :1], (low, Slots(k, k)), 0.1)
"""


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests run the kernels on this GPU")
def test_every_kernel_compiles_for_an_h100(tmp_path):
    root = Path(__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    ran = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    names = {"_row_lse", "_column_sums", "_norms", "_unit_sums", "_cosines", "_quantize", "_decode", "_merge"}
    assert set(ran.stdout.split()) == names
