"""What the pack loop takes from a config."""

from support.configs import short_run

from saeray.cluster.pack import checkpoint_steps


def test_checkpoints_come_at_the_guides_tokens():
    # range(0, 80, 80 // 4)[1:] = 20, 40, 60 tokens: steps 2.5 -> 2, 5, 7.5 -> 8 of 8 tokens.
    assert checkpoint_steps(short_run(n_checkpoints=4)) == {2, 5, 8}
    assert checkpoint_steps(short_run(n_checkpoints=0)) == set()
