"""dictionary_learning's side of benchmarks/peers.py; runs in an environment of its own."""

import json
import sys
import tempfile
import time

started = time.time()

import pyarrow.parquet  # noqa: E402
from dictionary_learning import AutoEncoder  # noqa: E402
from dictionary_learning.buffer import ActivationBuffer  # noqa: E402
from dictionary_learning.trainers.standard import StandardTrainer  # noqa: E402
from dictionary_learning.training import trainSAE  # noqa: E402
from nnsight import LanguageModel  # noqa: E402

settings = json.loads(sys.argv[1])
model = LanguageModel(settings["model"], device_map="cpu", dispatch=True)
model.tokenizer.pad_token = model.tokenizer.eos_token
texts = pyarrow.parquet.read_table(settings["dataset"]).column("text").to_pylist()
# It takes one context from each text, so texts are cut up, or most of the text would go unread.
pieces = [t[i : i + 600] for t in texts for i in range(0, len(t), 600)]


def data():
    while True:
        yield from pieces


rows = settings["n_batches_in_buffer"] * settings["store_batch_size"] * settings["context_size"]
buffer = ActivationBuffer(
    data(),
    model,
    model.transformer.h[1],
    d_submodule=settings["d_in"],
    n_ctxs=rows // settings["context_size"],
    ctx_len=settings["context_size"],
    refresh_batch_size=settings["store_batch_size"],
    out_batch_size=settings["batch"],
    device="cpu",
)
steps = settings["tokens"] // settings["batch"]
configs = [
    {
        "trainer": StandardTrainer,
        "dict_class": AutoEncoder,
        "activation_dim": settings["d_in"],
        "dict_size": settings["d_sae"],
        "lr": settings["lr"],
        "l1_penalty": l1 * settings["d_in"] * settings["mean_norm"],
        "warmup_steps": 10,
        "sparsity_warmup_steps": None,
        "steps": steps,
        "layer": 2,
        "lm_name": "tiny-python",
        "device": "cpu",
        "seed": 0,
    }
    for l1 in settings["l1"]
]
seconds = []  # when each SAE's step had been made
update = StandardTrainer.update


def after_step(self, *arguments):
    update(self, *arguments)
    seconds.append(time.time() - training)


StandardTrainer.update = after_step
training = time.time()
with tempfile.TemporaryDirectory() as folder:
    trainSAE(buffer, configs, steps=steps, save_dir=folder, device="cpu")
seconds = seconds[len(configs) - 1 :: len(configs)]
print("RESULT", json.dumps({"step_seconds": seconds, "start_s": training - started}))
