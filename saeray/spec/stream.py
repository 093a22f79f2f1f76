"""What a stream of activations is a function of, and which rows of the text it serves to SAEs.

    context_slice: [1, 127]                rows at these positions of a context, both ends included
    exclude_special_tokens: true           no rows of BOS, EOS, PAD and SEP
    exclude_special_tokens: [0, "<pad>"]   none of these token ids or names

The language model computes whole contexts all the same. A block of the stream has a fixed number of
rows that are served, so all that counts rows counts those: `training_tokens`, the order, batches.

Both fields have values that are lists. Such a list is a tuple in a config: a list is an axis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saeray.errors import bad_value

if TYPE_CHECKING:
    from saeray.spec.config import LanguageModelSAERunnerConfig

# SAEs that agree in these share one LM pass; `hook_point` is not among them, since one forward
# gives every hook point of a model.
STREAM_FIELDS = (
    "model_name",
    "model_revision",
    "trust_remote_code",
    "dataset_path",
    "dataset_split",
    "dataset_config",
    "dataset_revision",
    "txt_documents",
    "text_version",
    "is_dataset_tokenized",
    "streaming",
    "text_column",
    "prepend_bos",
    "context_size",
    "store_batch_size",
    "n_batches_in_buffer",
    "activation_dtype",
    "stream_tokens",
    "data_seed",
    "eval_windows",
    "buffer_bytes",
    "device",
)
ROW_FIELDS = ("exclude_special_tokens", "context_slice")  # whose values may be lists


def stream_values(config: LanguageModelSAERunnerConfig) -> dict[str, Any]:
    """All that a stream and its activations depend on, by field."""
    return {name: getattr(config, name) for name in STREAM_FIELDS} | row_values(config)


def row_values(config: LanguageModelSAERunnerConfig) -> dict[str, Any]:
    """What leaves rows out, by field, and nothing where all are served.

    So what was derived from a stream before there were these fields stays what it was.
    """
    given = {name: getattr(config, name) for name in ROW_FIELDS}
    return {name: value for name, value in given.items() if value not in (None, False)}


def in_lists(name: str, value: Any) -> Any:
    """A field's value, a list where it is an axis, and a tuple where it is a list and one value.

    An axis over lists has lists in it, or true and false: `[[0, 63], [64, 127]]`, `[false, true]`.
    """
    if not isinstance(value, (list, tuple)):
        return value
    if name not in ROW_FIELDS:
        return list(value)
    if any(isinstance(one, (list, tuple, bool)) for one in value):
        return [tuple(one) if isinstance(one, (list, tuple)) else one for one in value]
    return tuple(value)


def positions(config: LanguageModelSAERunnerConfig) -> range:
    """The positions of a context whose rows are served, special tokens or not."""
    if config.context_slice is None:
        return range(config.context_size)
    first, last = (p + config.context_size if p < 0 else p for p in config.context_slice)
    return range(first, last + 1)


def block_rows(config: LanguageModelSAERunnerConfig) -> int:
    """The rows of a block that are served.

    Without special tokens a block is as many contexts as it takes, of which the last one's rows
    may not all be needed. It has the rows of one context less, so that in a usual text
    store_batch_size contexts are enough: one forward.
    """
    contexts = config.store_batch_size
    if config.exclude_special_tokens:
        contexts = max(1, contexts - 1)
    return contexts * len(positions(config))


def check_rows(config: LanguageModelSAERunnerConfig) -> None:
    """Refuses a `context_slice` or an `exclude_special_tokens` that names no rows."""
    given, size = config.context_slice, config.context_size
    if given is not None:
        whole = len(given) == 2 and all(type(p) is int for p in given)
        if not whole or not all(-size <= p < size for p in given) or not positions(config):
            raise bad_value(
                "context_slice",
                list(given),
                f"[first, last] are wanted: positions of a context of {size}, 0 to {size - 1}, in "
                "this order, both of them served; -1 is the last one.",
            )
    excluded = config.exclude_special_tokens
    if isinstance(excluded, tuple):
        ids_and_names = all((type(t) is int and t >= 0) or (type(t) is str and t) for t in excluded)
        if not excluded or not ids_and_names:
            raise bad_value(
                "exclude_special_tokens",
                list(excluded),
                "true, false, or a list of token ids and names is wanted, like [0, '<pad>'].",
            )


def rows_said(config: LanguageModelSAERunnerConfig) -> str | None:
    """Which rows are served, and how many tokens that takes; None where all of them are."""
    said = []
    if config.context_slice is not None:
        at = positions(config)
        said.append(
            f"rows at positions {at.start} to {at.stop - 1} of 0 to {config.context_size - 1} "
            f"alone: {config.context_size / len(at):.3f} LM tokens computed for each"
        )
    if config.exclude_special_tokens:
        which = "special tokens (BOS, EOS, PAD, SEP)"
        if isinstance(config.exclude_special_tokens, tuple):
            which = "tokens " + ", ".join(map(repr, config.exclude_special_tokens))
        said.append(
            f"no rows of {which}: how many LM tokens that takes depends on the text, and is "
            "said at the end"
        )
    return "; ".join(said) or None
