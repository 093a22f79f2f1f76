"""Training, checkpoints, export and evaluation on a device that has no float64."""

import pytest
import torch
from safetensors.torch import load
from support.configs import short_run
from support.other_device import DEVICE, OtherDevice, There

from saeray.cluster.options import options_of
from saeray.files.checkpoint import load_sae, newest_checkpoint, save_checkpoint, save_final
from saeray.files.storage import Folder
from saeray.lm.evaluate import Evaluator
from saeray.lm.model import LanguageModel
from saeray.sae.architectures.standard import with_unit_rows
from saeray.sae.initial import initial_sae
from saeray.sae.pack_step import PackStep
from saeray.sae.trainer import SAETrainer
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.stream.arrays import to_array

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture
def config():
    """Ten steps in which firing statistics start anew and features die."""
    return short_run(
        use_ghost_grads=True, dead_feature_window=2, feature_sampling_window=4, lr_warm_up_steps=2
    )


def new_trainer(config, device):
    sae = initial_sae(4, 16, seed=0, b_dec=torch.zeros(4), dtype=torch.float32)
    sae.b_enc[:6] = -100.0  # these never fire
    return SAETrainer(sae.to(device), options_of(config, torch.device(device), sae.d_in))


def steps(trainer, first, last, device):
    """(losses, figures over features) of the last step."""
    pack = PackStep()
    for i in range(first, last):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i)).to(device)
        (metrics,) = pack.step([trainer], x, want_metrics=True)
    quality = [float(q) for q in metrics.reconstruction]
    return [float(m) for m in metrics[:5]] + quality, trainer.feature_metrics()


def test_the_device_of_the_tests_is_one():
    with OtherDevice():
        x = torch.arange(3.0).to(DEVICE)
        assert type(x) is There
        assert (x + 1).sum().device == DEVICE
        assert torch.equal((x + 1).cpu(), torch.tensor([1.0, 2.0, 3.0]))
        for make in (
            lambda: x.double(),
            lambda: torch.zeros(2, dtype=torch.float64, device=DEVICE),
            lambda: x.sum(dtype=torch.float64),
        ):
            with pytest.raises(TypeError, match="float64"):
                make()
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)


def test_steps_and_their_figures_are_the_cpus(config):
    want = steps(new_trainer(config, "cpu"), 0, 10, "cpu")
    with OtherDevice():
        trainer = new_trainer(config, DEVICE)
        got = steps(trainer, 0, 10, DEVICE)
        assert type(trainer.sae.W_enc.data) is There
    assert want[1]["sparsity/dead_features"] >= 6
    assert got[0] == pytest.approx(want[0], rel=1e-4)
    assert got[1] == pytest.approx(want[1], rel=1e-4)


def test_a_checkpoint_is_written_and_gone_on_from(config, tmp_path):
    with OtherDevice():
        trainer = new_trainer(config, DEVICE)
        steps(trainer, 0, 6, DEVICE)
        save_checkpoint(Folder.at(tmp_path / "checkpoints" / "48"), config, trainer)
        found, passed_over = newest_checkpoint(Folder.at(tmp_path / "checkpoints"))
        resumed = found.trainer(options_of(config, DEVICE, 4), DEVICE)
        assert steps(resumed, 6, 10, DEVICE) == steps(trainer, 6, 10, DEVICE)
    assert passed_over == []


def test_a_trained_sae_is_published_and_shown_to_harvesters(config, tmp_path):
    with OtherDevice():
        trainer = new_trainer(config, DEVICE)
        steps(trainer, 0, 5, DEVICE)
        save_final(Folder.at(tmp_path), config, trainer)
        snapshot = to_array(with_unit_rows(trainer.sae).W_enc.detach())
        frequency = trainer.firing_frequency
    assert (load_sae(str(tmp_path)).W_enc.numpy() == snapshot).all()
    sparsity = load((tmp_path / "sparsity.safetensors").read_bytes())["sparsity"]
    torch.testing.assert_close(sparsity, torch.log10(frequency + 1e-10).float())


def test_activations_and_evaluation_are_the_cpus(tiny):
    tokens = torch.randint(0, 4096, (2, 16), generator=torch.Generator().manual_seed(0))
    sae = initial_sae(128, 64, seed=0, b_dec=torch.zeros(128), dtype=torch.float32)
    model = LanguageModel(LanguageModelSAERunnerConfig(**tiny), [HOOK])

    def evaluated(device):
        figures = Evaluator(model, tokens).evaluate(sae.to(device), HOOK, final=True)
        del figures["plots/feature_density_line_chart"]
        features = {name: values.numpy() for name, values in figures.pop("features").items()}
        return figures, features, to_array(model.activations(tokens)[HOOK])

    want, of_features, x = evaluated("cpu")
    with OtherDevice():
        model.model.to(DEVICE)
        model.device = DEVICE
        got, features, y = evaluated(DEVICE)
    assert got.pop("warnings") == want.pop("warnings")
    assert got == pytest.approx(want, rel=1e-3, abs=1e-4)
    assert features.keys() == of_features.keys()
    for name, values in of_features.items():
        assert features[name] == pytest.approx(values, rel=1e-3, abs=1e-3, nan_ok=True), name
    assert y == pytest.approx(x, rel=1e-3, abs=1e-3)
