"""sparsify's side of quality_transcoders.py; runs in an environment of its own (see peers.py).

Its module, its loss and its optimizers as its `Trainer` sets them up: b_dec the mean of the first
batch's y, the encoder's bias centring the first batch's x, W_dec and W_skip from zero.
"""

import json
import os
import sys
from pathlib import Path

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # there is no GPU

import numpy as np
import torch
from safetensors.torch import save_file
from schedulefree import ScheduleFreeWrapper
from sparsify.config import SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from sparsify.sparse_coder import SparseCoder
from transformers import get_linear_schedule_with_warmup

settings = json.loads(sys.argv[1])
torch.set_num_threads(1)
x, y = (np.load(settings[name], mmap_mode="r") for name in ("x", "y"))
batch, n_steps = settings["batch"], settings["steps"]
for one in settings["coders"]:
    folder = Path(one["folder"])
    if (folder / "weights.safetensors").exists():
        continue
    torch.manual_seed(settings["seed"])
    config = SparseCoderConfig(
        k=one["k"],
        num_latents=settings["d_sae"],
        skip_connection=one["skip"],
        transcode=True,
    )
    coder = SparseCoder(x.shape[1], config, dtype=torch.float32)
    schedule = None
    if one["optimizer"] == "signum":
        optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=one["lr"]), momentum=0.95)
        optimizer.train()
    else:
        optimizer = torch.optim.Adam(coder.parameters(), lr=one["lr"])
        schedule = get_linear_schedule_with_warmup(optimizer, n_steps // 10, n_steps)
    silent = torch.zeros(settings["d_sae"], dtype=torch.int64)  # steps
    for i in range(n_steps):
        rows, wanted = (torch.from_numpy(a[i * batch : (i + 1) * batch].copy()) for a in (x, y))
        if i == 0:
            coder.encoder.bias.data = -rows.mean(0) @ coder.encoder.weight.data.T
            coder.b_dec.data = wanted.mean(0)
        dead = silent > settings["dead_feature_window"] if one["auxk"] else None
        out = coder(rows, wanted, dead_mask=dead)
        (out.fvu + one["auxk"] * out.auxk_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        silent += 1
        silent[out.latent_indices[out.latent_acts > 0].unique()] = 0
    if one["optimizer"] == "signum":
        optimizer.eval()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: p.detach().contiguous() for n, p in coder.named_parameters()}
    save_file(tensors, folder / "weights.safetensors")
    print(folder.name, "done", flush=True)
