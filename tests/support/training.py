"""SAEs in training, without files."""

from saeray.sae.trainer import SAETrainer


def gone_on_from(t):
    """A trainer made of copies of all that a checkpoint of `t` would hold."""
    tensors, numbers = t.state()
    return SAETrainer.resumed(
        t.sae.with_tensors({n: p.clone() for n, p in t.sae.tensors.items()}),
        t.options,
        {n: x.clone() for n, x in tensors.items()},
        numbers,
    )
