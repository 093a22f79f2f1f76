"""sae_lens' side of quality_architectures.py; runs in an environment of its own (see peers.py)."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

CONFIGS = {
    "standard": StandardTrainingSAEConfig,
    "gated": GatedTrainingSAEConfig,
    "topk": TopKTrainingSAEConfig,
    "batchtopk": BatchTopKTrainingSAEConfig,
    "matryoshka": MatryoshkaBatchTopKTrainingSAEConfig,
    "jumprelu": JumpReLUTrainingSAEConfig,
}

settings = json.loads(sys.argv[1])
torch.set_num_threads(1)
activations = np.load(settings["activations"], mmap_mode="r")
batch, n_steps = settings["batch"], settings["steps"]
for one in settings["saes"]:
    folder = Path(one["folder"])
    if (folder / "cfg.json").exists():
        continue
    torch.manual_seed(settings["seed"])
    config = CONFIGS[one["architecture"]](
        d_in=activations.shape[1], d_sae=settings["d_sae"], **one["fields"]
    )
    sae = TrainingSAE.from_dict(config.to_dict())
    if settings["start"] is not None:
        for name, value in load_file(settings["start"]).items():
            getattr(sae, name).data.copy_(value)
    rows = (torch.from_numpy(activations[i * batch : (i + 1) * batch]) for i in range(n_steps))
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=n_steps * batch,
            train_batch_size_samples=batch,
            lr=settings["lr"],
            lr_end=settings["lr"] / 10,  # for a decay, of which there is none
            dead_feature_window=settings["dead_feature_window"],
        ),
        sae,
        rows,
    )
    trainer.fit()
    sae.save_inference_model(folder)
    print(folder.name, "done", flush=True)
