"""Features of SAEs that nobody had to train, gathered without Ray."""

import numpy as np
import torch
from support.bundled import fields

from saeray.files.checkpoint import sae_files
from saeray.files.results import result_row, varying_fields, write_results
from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder
from saeray.sae.architectures.standard import StandardSAE
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve
from saeray.spec.messages import DONE
from saeray.stream.check import open_text
from saeray.stream.feature_harvester import FeatureHarvester, FeatureJob, Wanted

D, L = 128, 96
TOP, BANDS, PER_BAND = 6, 3, 2


def sparse_sae(seed):
    """A few features active per token; the last two never are."""
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(L, D, generator=g), dim=1)
    b_enc = torch.full((L,), -4.0)
    b_enc[-2:] = -1e6
    return StandardSAE(W_dec.t().contiguous(), W_dec, b_enc, torch.zeros(D))


def sweep_of(where, **saes):
    """A finished sweep on the bundled model with these SAEs, by name; its folder."""
    folder = Folder.at(where)
    configs = {
        name: resolve(LanguageModelSAERunnerConfig(**fields(lr=1e-3 * (i + 1))))
        for i, name in enumerate(saes)
    }
    files = SweepFolder(folder, folder.name)
    files.write_sweep_yaml(configs, {}, {})
    axes = varying_fields(list(configs.values()))
    rows = [result_row(n, c, axes, DONE, None, {}, None) for n, c in configs.items()]
    write_results(folder, rows)
    for name, sae in saes.items():
        final = folder / "trials" / name / "final"
        final.publish(sae_files(configs[name], sae, torch.zeros(L), None))
    return folder


def job_of(folder, *names):
    hook = "blocks.2.hook_resid_pre"
    return FeatureJob(
        {n: Wanted((folder / "trials" / n / "final").uri, hook, hook, L) for n in names},
        64, TOP, BANDS, PER_BAND, folder.uri, (folder / "features" / ".pass").uri,
    )  # fmt: skip


ABOUT = {
    "digest": "d", "sweep": "s", "architecture": "standard", "model_name": "tiny-python",
    "hook_point": "blocks.2.hook_resid_pre", "writes_to": "blocks.2.hook_resid_pre",
    "dataset_path": "train.parquet", "context_size": 64, "prepend_bos": True, "top": TOP,
    "bands": BANDS, "per_band": PER_BAND, "held_out_windows": 8, "windows": 40,
}  # fmt: skip


FIRSTS = [0, 8, 16, 24, 32]


def parts():
    """(number, tokens) of the first 40 windows of the bundled text."""
    config = resolve(LanguageModelSAERunnerConfig(**fields()))
    text = open_text(config, lambda _: None)
    windows = np.concatenate([text.evaluation(), text.train(0, 32)])
    return [(i, windows[8 * i : 8 * i + 8]) for i in range(5)]


def harvester(job, name="harvester-0", saved=(), **changes):
    made = FeatureHarvester(fields(**changes), ["blocks.2.hook_resid_pre"])
    made.config = resolve(made.config)
    has = made.begin(job, name, list(saved))
    return made, has
