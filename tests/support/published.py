"""SAEs of every architecture after a few steps on random rows, saved as a sweep saves them."""

import torch
from support.configs import short_run

from saeray.cluster.options import options_of
from saeray.files.checkpoint import save_final
from saeray.files.storage import Folder
from saeray.sae.architectures import ARCHITECTURES
from saeray.sae.architectures.standard import with_unit_rows
from saeray.sae.initial import initial_sae
from saeray.sae.pack_step import PackStep
from saeray.sae.trainer import SAETrainer

CPU = torch.device("cpu")
FIELDS = {
    "standard": {}, "p_anneal": {}, "gated": {}, "topk": {"k": 3}, "batchtopk": {"k": 3},
    "matryoshka": {"k": 3}, "jumprelu": {"l0_coefficient": 0.01},
}  # fmt: skip


def config_of(architecture, **changes):
    return short_run(architecture=architecture, **FIELDS[architecture] | changes)


def trained(folder, architecture, d_in=4, d_sae=16, seed=0, **changes):
    """Trains one for five steps and publishes it in a folder; the SAE."""
    c = config_of(architecture, **dict(recipe="sae_lens", expansion_factor=d_sae / d_in) | changes)
    options = options_of(c, CPU, d_in)
    sae = initial_sae(
        d_in, d_sae, seed=seed, b_dec=torch.ones(d_in), dtype=torch.float32, decoder_init_norm=0.5,
        encoder_init="decoder_transpose", architecture=ARCHITECTURES[architecture], options=options,
    )  # fmt: skip
    t = SAETrainer(sae, options)
    for i in range(5):
        PackStep().step([t], torch.randn(64, d_in, generator=torch.Generator().manual_seed(i)))
    save_final(Folder.at(folder), c, t)
    free = c.decoder_norm == "free"
    return with_unit_rows(t.published) if free else t.published
