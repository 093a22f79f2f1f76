"""GPU memory, with the arithmetic, and what is refused."""

import pytest
from support.bundled import HOOK
from support.configs import config

from saeray.errors import ConfigError
from saeray.sae.gpu import sparse_step as gpu_step
from saeray.sae.trainer import SPARSE_BELOW_ON_GPU
from saeray.spec.gpu_memory import CONTEXT, bytes_of_gpu, check_gpu_memory, gpu_memory_of
from saeray.spec.memory import CHUNK_BYTES, MOST_ACTIVE, fit_saes, memory_of
from saeray.spec.room import HEAD, Cluster, Node

GB = 10**9
D_IN, D_SAE, ROWS = 1000, 32_000, 4096
NUMBERS = 2 * D_IN * D_SAE + D_IN + D_SAE  # of an SAE


def node(gpus, kind="H100", **labels):
    resources = {"CPU": 16, "GPU": gpus, f"accelerator_type:{kind}": 1.0, HEAD: 1.0}
    return Cluster((Node("here", resources, id="here"),))


def planned(cluster, n_saes=1, parameter_bytes=2 * GB, **changes):
    saes = [config(expansion_factor=32, device="cuda", **changes)] * n_saes
    fitted = fit_saes(saes, cluster, use_gpu=True)
    memory = memory_of(saes, fitted, {HOOK: D_IN}, parameter_bytes, 0)
    return gpu_memory_of(saes, memory, {HOOK: D_IN}, parameter_bytes, 50_000), fitted


def test_what_a_trainer_and_a_language_model_take():
    taken, _ = planned(node(1), n_saes=2)
    # Of two SAEs weights, two moments and a copy of the weights in bfloat16; one gradient. Two
    # [4096, 32000] of a dense step in bfloat16, a chunk of 96 MiB; three bits of every entry, and
    # lists of one in 200 and a quarter more: 16 bytes, and 2 rows of sums for 128 of them twice.
    saes = 2 * 3 * NUMBERS * 4 + NUMBERS * 4 + 2 * NUMBERS * 2
    entries = ROWS * D_SAE / 200 * 1.25
    sparse = ROWS * D_SAE * 3 / 8 + entries * (16 + 2 * 2 * D_IN * 4 / 128)
    activations = 2 * ROWS * D_SAE * 2 + 96 * 2**20 + int(sparse)
    activations += ROWS * D_IN * 4 + 4 * ROWS * D_IN * 4  # the errors, and four batches of rows
    assert taken.trainer == CONTEXT + saes + activations


def test_the_plan_knows_the_sizes_of_the_step():
    assert MOST_ACTIVE == SPARSE_BELOW_ON_GPU
    assert CHUNK_BYTES == gpu_step.CHUNK_BYTES


def test_architectures_without_kernels_of_their_own_take_three_blocks():
    taken, _ = planned(node(1), architecture="topk", k=32)
    threshold = D_SAE * 4
    saes = (
        3 * (NUMBERS * 4 + threshold) + (NUMBERS * 4 + threshold) + (NUMBERS * 4 + threshold) // 2
    )
    activations = 3 * ROWS * D_SAE * 4 + ROWS * D_IN * 4 + 4 * ROWS * D_IN * 4
    assert taken.trainer == pytest.approx(CONTEXT + saes + activations, rel=1e-3)


def test_the_language_model():
    taken, _ = planned(node(1), n_saes=2)
    # A forward of 32 x 128 tokens at 20 numbers of d_in is more than four blocks of a window's
    # logits; two SAEs of 256 MB are more than a harvester has at a time, which is then its largest.
    at_harvester = max(NUMBERS * 4, 1 << 28)
    forward = max(20 * 32 * 128 * D_IN * 4, 4 * 128 * 50_000 * 4)
    assert taken.language_model == CONTEXT + 2 * GB + at_harvester + forward
    assert "weights" in str(taken)
    assert "Adam" in str(taken)


def test_ray_knows_the_kind_of_a_gpu_and_so_its_memory():
    assert bytes_of_gpu({"GPU": 1.0, "accelerator_type:T4": 1.0}) == 15e9
    assert bytes_of_gpu({"GPU": 1.0}) == bytes_of_gpu({"accelerator_type:new": 1.0}) == 0


def test_what_does_not_fit_onto_a_gpu_is_refused_with_the_numbers():
    taken, fitted = planned(node(2), n_saes=8)  # about 8 GB
    check_gpu_memory(taken, fitted, node(2), fitted.harvester_nodes)
    wide, fitted = planned(node(2, "T4"), n_saes=40)  # 30.7 GB of weights and moments
    with pytest.raises(
        ConfigError, match=r"a rank of the largest pack takes \d+.*GPU of here has 15 GB"
    ):
        check_gpu_memory(wide, fitted, node(2, "T4"), fitted.harvester_nodes)
    large, fitted = planned(node(2, "T4"), parameter_bytes=16 * GB)
    with pytest.raises(ConfigError, match=r"a language model takes 17.* has 15 GB"):
        check_gpu_memory(large, fitted, node(2, "T4"), fitted.harvester_nodes)
    # Nobody knows how large the GPUs are: nothing is refused; asked, they are.
    check_gpu_memory(large, fitted, node(2, "new"), fitted.harvester_nodes)
    with pytest.raises(ConfigError, match="has 10 GB"):
        check_gpu_memory(large, fitted, node(2, "new"), fitted.harvester_nodes, known=10e9)


def test_those_that_share_a_gpu_count_together():
    taken, fitted = planned(node(1, "T4"), n_saes=8, parameter_bytes=6 * GB)
    assert (fitted.trainer_gpus, fitted.harvester_gpus) == (0.75, 0.25)
    assert max(taken.trainer, taken.language_model) < 15e9 < taken.trainer + taken.language_model
    with pytest.raises(ConfigError, match=r"are needed \(\d.* for packs, .* for language models\)"):
        check_gpu_memory(taken, fitted, node(1, "T4"), fitted.harvester_nodes)
