"""sae_lens' side of benchmarks/evals.py; runs in an environment of its own (see peers.py)."""

import json
import sys
from types import SimpleNamespace

from sae_lens import SAE
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file

settings = json.loads(sys.argv[1])
tokens = load_file(settings["tokens"])["tokens"]
model = load_model("AutoModelForCausalLM", settings["model"], device="cpu")
# All it asks of its store of activations: the same tokens, at once, whenever it wants a batch.
store = SimpleNamespace(
    get_batch_tokens=lambda _: tokens,
    reset_input_dataset=lambda: None,
    context_size=tokens.shape[1],
    store_batch_size_prompts=len(tokens),
)
found = []
for folder in settings["saes"]:
    sae = SAE.load_from_disk(folder)
    sae.cfg.metadata.hook_name = settings["hf_module"]
    groups, of_features = run_evals(
        sae,
        store,
        model,
        ActivationScaler(),
        get_eval_everything_config(len(tokens), n_eval_reconstruction_batches=1),
        exclude_special_tokens=settings["excluded"] or False,
    )
    scalars = {name: value for group in groups.values() for name, value in group.items()}
    found.append({"scalars": scalars, "density": of_features["feature_density"]})
print("RESULT", json.dumps(found))
