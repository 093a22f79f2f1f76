"""sae_lens' side of benchmarks/peers.py; runs in an environment of its own (see there)."""

import json
import sys
import time

started = time.time()

import torch  # noqa: E402
from sae_lens import (  # noqa: E402
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    StandardTrainingSAEConfig,
)
from sae_lens.training.multi_sae_trainer import MultiSAETrainer  # noqa: E402

seconds = []  # when each step of all SAEs had been made
update_pbar = MultiSAETrainer._update_pbar


def after_step(self, *arguments):
    seconds.append(time.time() - training)
    update_pbar(self, *arguments)


MultiSAETrainer._update_pbar = after_step
settings = json.loads(sys.argv[1])
torch.manual_seed(settings.get("seed", 0))  # its runner seeds nothing
# In its units: coefficient * d_in * mean norm of the centred activations.
in_its_units = [x * settings["d_in"] * settings["mean_norm"] for x in settings["l1"]]
runner = MultiSAETrainingRunner(
    MultiSAETrainingRunnerConfig(
        saes={
            f"l1={l1:g}": StandardTrainingSAEConfig(
                d_in=settings["d_in"],
                d_sae=settings["d_sae"],
                l1_coefficient=l1,
                l1_warm_up_steps=settings.get("l1_warm_up_steps", 0),
            )
            for l1 in settings.get("l1_of_sum", in_its_units)
        },
        # The plain Hugging Face forward, its fastest; resid_pre of block 2 is block 1's output.
        hook_names=settings.get("hf_module", "transformer.h.1"),
        model_class_name="AutoModelForCausalLM",
        model_name=settings["model"],
        dataset_path=settings["dataset_folder"],
        streaming=False,
        context_size=settings["context_size"],
        # It counts activations of one prompt, not of a batch of them: the same buffer in rows.
        n_batches_in_buffer=settings["n_batches_in_buffer"] * settings["store_batch_size"],
        store_batch_size_prompts=settings["store_batch_size"],
        train_batch_size_tokens=settings["batch"],
        training_tokens=settings["tokens"],
        lr=settings["lr"],
        lr_decay_steps=settings.get("lr_decay_steps", 0),
        n_eval_batches=0,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=settings.get("output"),
        device="cpu",
        seed=settings.get("seed", 0),
    )
)
training = time.time()
runner.run()
print("RESULT", json.dumps({"step_seconds": seconds, "start_s": training - started}))
