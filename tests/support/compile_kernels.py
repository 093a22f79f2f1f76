"""Compiles every kernel for a GPU that need not be here, and prints their names.

A process of its own: Triton asks its driver which GPU there is, and here the answer is made up.
What the sparse step launches on the way is compiled as it would be, and not run.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from saeray.sae.architectures.standard import StandardSAE
from saeray.sae.gpu.adam import HalfWeights, fused_adam_rows
from saeray.sae.gpu.dense_step import DenseSpace, dense_gradients
from saeray.sae.gpu.sparse_step import CudaSpace, sparse_gradients
from saeray.sae.gradients import Batch, Gradients

B, L, D = 64, 256, 768
PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")


class MadeUpDriver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)  # an H100

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(kernel, *args, grid, warmup, **kwargs):
    done = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
    assert done.asm["cubin"]
    names.add(kernel.__name__)


names, launch = set(), JITFunction.run
JITFunction.run = compile_only
rows = torch.zeros(L, D)
sae = StandardSAE(rows.t(), rows.clone(), torch.zeros(L), torch.zeros(D))
x, out, half = torch.zeros(B, D), Gradients(sae), HalfWeights(sae)
moments = {k: (getattr(out, k), getattr(out, k)) for k in PARAMETERS}
driver.set_active(MadeUpDriver())
for fused_encoder in (False, True):
    sparse_gradients(
        sae, Batch.of(x, "none"), penalty=torch.ones(L), want_l1=True,
        errors=torch.zeros_like(x), out=out, half=half,
        space=CudaSpace(sae, B, "bfloat16", fused_encoder=fused_encoder),
    )  # fmt: skip
dense_gradients(
    sae, Batch.of(x, "none"), penalty=torch.ones(L), want_l1=True, errors=torch.zeros_like(x),
    out=out, half=half, space=DenseSpace(sae, B, "bfloat16"),
)  # fmt: skip
fused_adam_rows(
    sae, out, moments, torch.ones(2), beta1=0.9, beta2=0.999, unit=True, gradient_clip=1.0,
    half=half,
)  # fmt: skip
print(*sorted(names))
