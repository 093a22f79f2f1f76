"""Folders of sweeps that nobody had to run: configs, rows and weights as a real one leaves them."""

import torch
from support.configs import config

from saeray.files.checkpoint import sae_files
from saeray.files.results import result_row, varying_fields, write_results
from saeray.files.storage import Folder
from saeray.files.sweep_folder import Outcome, SweepFolder
from saeray.sae.architectures.standard import StandardSAE
from saeray.spec.config import resolve
from saeray.spec.messages import DONE

FIGURES = {
    "l0": "eval/l0",
    "ev": "eval/explained_variance",
    "ce": "eval/CE_loss_score",
}


def sae(l0=None, ev=None, ce=None, state=DONE, W_dec=None, **changes):
    """One SAE for `finished`: its figures, its state, its decoder and its fields."""
    figures = {"l0": l0, "ev": ev, "ce": ce}
    metrics = {FIGURES[k]: v for k, v in figures.items() if v is not None}
    metrics |= {"details/n_training_tokens": 80, "sparsity/below_dead_feature_threshold": 3}
    return dict(metrics=metrics, state=state, W_dec=W_dec, changes=changes)


def finished(where, with_results=True, **saes):
    """Writes a sweep of these SAEs, by name, to a path; its folder."""
    folder = where if isinstance(where, Folder) else Folder.at(where)
    files = SweepFolder(folder, folder.name)
    small = dict(train_batch_size=8, training_tokens=80, log_to_wandb=False, data_seed=1)
    outcomes = [
        Outcome(
            name,
            resolve(config(**(small | of["changes"]))),
            of["state"],
            (folder / "trials" / name / "final").uri,
            of["metrics"],
            None,
        )
        for name, of in saes.items()
    ]
    files.write_sweep_yaml({o.name: o.config for o in outcomes}, {}, {})
    if with_results:
        axes = varying_fields([o.config for o in outcomes])
        rows = [
            result_row(o.name, o.config, axes, o.state, o.path, o.metrics, o.error)
            for o in outcomes
        ]
        write_results(folder, rows)  # without the picture, which takes a while
    for (name, of), outcome in zip(saes.items(), outcomes, strict=True):
        if of["W_dec"] is not None:
            L, D = of["W_dec"].shape
            zeros = torch.zeros(L)
            trained = StandardSAE(torch.zeros(D, L), of["W_dec"], zeros, torch.zeros(D))
            (folder / "trials" / name / "final").publish(
                sae_files(outcome.config, trained, zeros, None)
            )
    return folder
