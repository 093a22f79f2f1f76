"""A sweep's folder with everything that its page draws, of any number of SAEs; nobody ran it."""

import json
import math

from support.configs import config

from saeray.files.account import Session, add_session
from saeray.files.results import result_row, varying_fields, write_results
from saeray.files.storage import Folder
from saeray.files.sweep_folder import Outcome, SweepFolder
from saeray.spec.config import resolve
from saeray.spec.grid import expand
from saeray.spec.messages import DONE, FAILED, WAITING

EDGES = [round(-10 + 0.2 * i, 1) for i in range(51)]
D_SAE = 256  # at expansion factor 4


def figures_at(l0, gain, width):
    """Held-out figures as an SAE of this L0 has them; `gain` above 0 makes it better."""
    fvu = min(0.95, (1.6 - gain) / (1 + l0) ** 0.6)
    counts = [0] * 50
    for j in range(15, 50):
        centre = -10 + 0.2 * j + 0.1
        peak = math.log10(l0 / width)
        counts[j] = round(width * 0.2 / 1.2 * math.exp(-(((centre - peak) / 0.7) ** 2)))
    counts[0] = max(0, width - sum(counts))
    return {
        "eval/l0": l0,
        "eval/fvu": fvu,
        "eval/explained_variance": 1 - fvu,
        "eval/CE_loss_score": 1 - fvu**1.5,
        "eval/kl_div_with_sae": 4 * fvu**1.5,
        "eval/dense_share": sum(counts[45:]) / width,
        "sparsity/below_dead_feature_threshold": counts[0] // 2,
        "eval/features_never_fired": counts[0],
        "plots/feature_density_line_chart": {"counts": counts, "edges": EDGES},
    }


def log_of(config, metrics, upto, n_lines=20):
    """The lines that an SAE has logged up to a share of its training."""
    lines = []
    for i in range(1, n_lines + 1):
        at = upto * i / n_lines
        fading = math.exp(-4 * at)
        lines.append(
            {
                "step": i,
                "details/n_training_tokens": int(at * config.training_tokens),
                "losses/overall_loss": 0.02 + fading,
                "losses/mse_loss": 0.01 + fading,
                "metrics/l0": metrics["eval/l0"] * (1 + 5 * fading),
                "metrics/fvu": metrics["eval/fvu"] * (1 + fading),
                "details/current_learning_rate": config.lr * min(1, 10 * at),
            }
        )
    lines[-1] |= metrics | {"eval/n_tokens": 4096}
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def pictured(where, ends=None, error="loss is not a number at step 7", session=True, **fields):
    """Writes the sweep that the fields span; its folder.

    ends: the state of SAEs by number, where it is not `done`.
    """
    folder = where if isinstance(where, Folder) else Folder.at(where)
    files = SweepFolder(folder, folder.name)
    plain = dict(train_batch_size=8, training_tokens=8000, log_to_wandb=False, data_seed=1)
    saes = expand(resolve(config(**(plain | fields))))
    states = [(ends or {}).get(i, DONE) for i in range(len(saes))]
    outcomes = []
    for i, (sae, state) in enumerate(zip(saes, states, strict=True)):
        strength = sae.config.l1_coefficient or 1 / (sae.config.k or 10)
        width = round(D_SAE / 4 * sae.config.expansion_factor)
        l0 = 0.04 / strength * (1 + 0.03 * math.sin(i)) * sae.config.expansion_factor**0.2
        gain = 0.1 * math.sin(2.5 * i) + 0.3 * (sae.config.architecture != "standard")
        metrics = figures_at(l0, gain, width)
        upto = 1.0 if state == DONE else 0.4
        log = log_of(sae.config, metrics, upto)
        if state != WAITING or i % 2:
            (folder / "trials" / sae.name).write("metrics.jsonl", log)
        metrics["details/n_training_tokens"] = int(upto * sae.config.training_tokens)
        path = (folder / "trials" / sae.name / "final").uri if state == DONE else None
        failed = error if state == FAILED else None
        ended = metrics if state == DONE else {}
        outcomes.append(Outcome(sae.name, sae.config, state, path, ended, failed))
    files.write_sweep_yaml(
        {o.name: o.config for o in outcomes}, {"saeray": "0.1.0"}, {"harvesters": 1}
    )
    axes = varying_fields([o.config for o in outcomes])
    rows = [
        result_row(o.name, o.config, axes, o.state, o.path, o.metrics, o.error)
        for o in outcomes
        if o.state != WAITING
    ]
    if rows:
        write_results(folder, rows)
    if session:
        session = Session(
            began=1e9,
            ended=1e9 + 100,
            start_up_s=20.0,
            training_s=70.0,
            trainers_s={"the SAEs' step": 60.0, "waiting for activations": 9.0},
            harvesters_s={"the language model": 30.0, "idle": 40.0},
            harvested_tokens=8200,
            cached_tokens=0,
            trained_tokens=len(rows) * 8000,
            one_pass_tokens=8000,
            evaluation_tokens=4096,
            packs=1,
            limit="the SAEs' step (90% of the time; harvesters idle 57%)",
            placement="1 pack on 2 cores",
            warnings=[],
        )
        add_session(folder, session)
    return folder
