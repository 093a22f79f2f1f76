"""Names of figures: of a training batch, held out, and as they were before."""

from saeray.spec.metric_names import by_prefix, held_out, with_aliases


def test_held_out_figures_have_a_prefix_of_their_own():
    found = {"metrics/l0": 1.0, "eval/n_tokens": 64, "plots/x": {}, "ground_truth/mcc": 0.5}
    named = {"eval/l0": 1.0, "eval/n_tokens": 64, "plots/x": {}, "ground_truth/mcc": 0.5}
    assert held_out(found) == named


def test_a_line_of_before_is_read_by_the_names_of_now():
    before = {"step": 4, "losses/mse_loss": 2.0, "metrics/l0": 1.0, "eval/n_tokens": 64}
    now = {"step": 4, "losses/mse_loss": 2.0, "eval/l0": 1.0, "eval/n_tokens": 64}
    assert by_prefix(before) == now
    both = now | {"metrics/l0": 3.0}
    assert by_prefix(both) == both
    of_a_batch = {"step": 4, "metrics/l0": 3.0}
    assert by_prefix(of_a_batch) == of_a_batch


def test_tunes_results_have_the_names_of_before_where_no_batch_has_them():
    told = with_aliases({"metrics/l0": 3.0, "eval/l0": 1.0, "eval/mdl": 9.0, "eval/n_tokens": 64})
    assert told == {
        "metrics/l0": 3.0, "eval/l0": 1.0, "eval/mdl": 9.0, "metrics/mdl": 9.0, "eval/n_tokens": 64,
    }  # fmt: skip
