"""The configuration: the guide's `LanguageModelSAERunnerConfig`, field by field.

Plain data. This module imports neither torch nor Ray, so a laptop or a Tune trial can read a
config in milliseconds. A *list* in any field is a grid axis (`grid` multiplies it out); a config
without lists describes exactly one SAE, and that SAE is a function of it.

Nothing is repaired in silence: an unknown key, a wrong type or a contradiction raises
`ConfigError` with the field, the value and what would be right.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from saeray.errors import ConfigError, bad_value
from saeray.spec import architectures, recipes, synthetic, transcoder
from saeray.spec.checks import AUTO, check_counts, check_types, check_values
from saeray.spec.guide import in_our_words
from saeray.spec.points import all_values, checked_entries
from saeray.spec.resources import Resources, resources_from
from saeray.spec.scheduler import Scheduler, check_scheduler, scheduler_from
from saeray.spec.stream import block_rows, in_lists, stream_values

# Tokens; docs/metrics.md: what evaluation costs. Of a grid it is at most one whole forward for 25
# tokens that are harvested, where each SAE's evaluation takes two: with it in place, and without.
TRAINED_PER_EVALUATED = 200
HARVESTED_PER_EVALUATED = 2 * 25


@dataclass(frozen=True, kw_only=True)
class LanguageModelSAERunnerConfig:
    """One SAE (or, with lists in its fields, a grid of SAEs) on one language model's activations.

    The names, units and defaults are those of the early-2024 guide "Training Sparse Autoencoders";
    fields that saeray adds stand in blocks of their own, each with its unit.
    """

    # The language model and its text
    # hub name (gpt2-small), a local Hugging Face directory, or synthetic:… (saeray.spec.synthetic)
    model_name: str
    hook_point: str  # TransformerLens hook name; may hold {layer}
    hook_point_layer: int | None = None  # must agree with hook_point; None: read from it
    # saeray: what a transcoder makes of hook_point's activations; may hold {layer}. None: an SAE
    hook_point_out: str | None = None
    skip_connection: bool = False  # saeray: of a transcoder: + x W_skip, which starts at 0
    d_in: int | None = None  # width of the hooked activation; None: asked of the model
    dataset_path: str  # hub name, or parquet / json / text files (local, s3://…), a saved dataset
    is_dataset_tokenized: bool | None = None  # None: told from the columns
    context_size: int = 128  # tokens per LM context
    # saeray: how the text is read
    dataset_split: str = "train"  # as `datasets.load_dataset` finds them, in a folder too
    dataset_config: str | None = None  # of datasets with several configurations
    dataset_revision: str | None = None  # of a hub dataset: branch, tag or commit
    streaming: bool | None = None  # None: hub names and URIs stream, local files do not
    text_column: str | None = None  # None: `tokens`, `input_ids` or `text`
    # What is a document in a .txt file: what stands between blank lines (blank_line), the whole
    # file, or a line. None: blank_line where the first file has any, else line.
    txt_documents: str | None = None
    text_version: int = 2  # how text becomes windows; 1: of sweeps begun with saeray 0.1
    prepend_bos: bool = True  # every document begins with the model's BOS token
    # Rows that no SAE sees: of BOS, EOS, PAD and SEP (true), or of these token ids or names (list)
    exclude_special_tokens: bool | tuple = False
    # [first, last] position of a context, both served; -1: the last one. None: all positions
    context_slice: tuple | None = None
    trust_remote_code: bool = False
    model_revision: str | None = None

    # The SAE
    # saeray: standard, p_anneal, gated, topk, batchtopk, matryoshka or jumprelu. What only some of
    # them have is None where it is not given, and then filled by saeray.spec.architectures.
    architecture: str = "standard"
    expansion_factor: int | float = 4  # d_sae = d_in * expansion_factor
    # saeray: a trained SAE to start from, ours or sae_lens's: a folder, or its name on the hub
    init_from: str | None = None
    b_dec_init_method: str | None = None  # geometric_median, mean or zeros; None: the recipe's
    b_dec_init_rows: int = 4096  # saeray: rows sampled from the first half buffer for it
    dtype: str = "float32"  # of the SAE's weights, sums and Adam: float32 or float64
    # saeray: of the step's matrix products. auto: bfloat16 on cuda, float32 elsewhere.
    compute_dtype: str = "auto"
    seed: int = 42

    # saeray: how it starts and what it minimises; None: as the recipe says
    # guide, guide-2024, sae_lens or anthropic-april: fills what is not given. None: guide for
    # standard, sae_lens for the other architectures and for transcoders.
    recipe: str | None = None
    encoder_init: str | None = None  # decoder_transpose (times encoder_init_scale) or independent
    encoder_init_scale: float | None = None
    decoder_init_norm: float | None = None  # of the decoder's rows at the start
    decoder_norm: str | None = None  # unit, or free: the L1 is then weighted by the rows' norms
    mse_normalization: str | None = None  # centred_norm (the guide's), none, or sum over d_in
    l1_warm_up_steps: int | None = None  # optimizer steps; the coefficient rises linearly from 0
    lr_decay_steps: int | None = None  # optimizer steps at the end; lr falls linearly to 0
    gradient_clip: float | None = None  # of the norm of all parameters' gradient; 0: none
    normalize_activations: str | None = None  # none, or expected_average: mean norm sqrt(d_in)

    # Training
    lr: float | str = 3e-4  # topk family: or auto, 2e-4 / sqrt(d_sae / 2^14); needs d_in
    l1_coefficient: float | None = None  # standard, p_anneal, gated; 1e-3 for the guide's loss
    # saeray: active features per row. The coefficient (jumprelu: θ) is steered there; topk's k.
    target_l0: float | None = None
    # None: constantwithwarmup, with what the recipe says of lr_decay_steps
    lr_scheduler_name: str | None = None
    lr_warm_up_steps: int | None = None  # optimizer steps; None: the recipe's
    lr_end: float = 0.0  # a fraction of lr (0.1: a tenth of it), where cosine schedules end
    num_cycles: int = 1  # half cosines of cosineannealingwarmrestarts, of the same length
    train_batch_size: int = 4096  # tokens per optimizer step
    training_tokens: int = 2_000_000  # steps = training_tokens // train_batch_size
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999

    # saeray: what only some architectures have
    p_end: float | None = None  # p_anneal: the power at the end
    p_anneal_start_step: int | None = None  # p_anneal: optimizer steps; a quarter of all
    p_updates: int | None = None  # p_anneal: in how many steps the power falls from 1
    # gated: decoder in the auxiliary loss, constant or live. None: as its rows are, unit or free.
    gated_aux_decoder: str | None = None
    k: float | None = None  # topk family: active features, of a row or as a mean over the batch
    auxk_coefficient: float | None = None  # topk family: of the term for dead features; 0: none
    auxk_scaling: str | None = None  # topk family: residual_variance (1/32) or dead_share (1)
    topk_threshold_rate: float | None = None  # batchtopk, matryoshka: of the running mean
    matryoshka_widths: str | None = None  # matryoshka: 64,256; d_sae itself is added
    l0_coefficient: float | None = None  # jumprelu
    jumprelu_sparsity_loss_mode: str | None = None  # jumprelu: step, tanh or quadratic
    jumprelu_init_threshold: float | None = None  # jumprelu: of all features at the start
    jumprelu_bandwidth: float | None = None  # jumprelu: around a threshold, where it learns
    jumprelu_tanh_scale: float | None = None  # jumprelu, tanh
    jumprelu_ste_to_input: bool | None = None  # jumprelu: whether the encoder learns there too
    pre_act_loss_coefficient: float | None = None  # jumprelu: of the term for dead features

    # The activation buffer
    n_batches_in_buffer: int = 20  # LM batches mixed at a time
    store_batch_size: int = 32  # contexts per LM forward
    activation_dtype: str = "float32"  # saeray: of the buffered activations
    buffer_bytes: int | None = None  # saeray: bound on the object store; None: what is needed
    stream_tokens: int | None = None  # saeray: length of the stream; None: training_tokens
    data_seed: int | None = None  # saeray: seeds the order of text and rows; None: seed
    activation_cache: str | None = None  # saeray: path or URI to keep harvested blocks in
    # saeray: how long fast packs wait for a slow one, in all; where they share cores, at a time
    reader_lag_s: float = 300.0
    share_stream: bool = False  # saeray: with other sweeps of the cluster that say so, too

    # Dead features
    use_ghost_grads: bool | None = None  # standard, p_anneal; false
    feature_sampling_method: str | None = None  # standard, p_anneal, gated: anthropic, l2; none
    feature_sampling_window: int = 2000  # optimizer steps between resets of firing statistics
    dead_feature_window: int | None = None  # steps without firing: dead; None: the recipe's
    dead_feature_threshold: float = 1e-8  # firing frequency below which reports call it dead

    # saeray: evaluation on held-out windows
    eval_windows: int = 64  # contexts set aside; no SAE ever trains on them
    # Optimizer steps; 0: at the end only; None: 10 x wandb_log_frequency, or so many that 200
    # tokens are trained on for each that is evaluated on (of more than four SAEs: 50 for each of
    # them), whichever is more.
    eval_every: int | None = None

    # saeray: points beside those of the lists in fields, and what stops SAEs early
    grid: dict | None = None  # a list of partial configs
    scheduler: Scheduler | None = None  # {name: asha, metric: CE_loss_score}

    # Results
    log_to_wandb: bool = True
    wandb_project: str = "saeray"
    wandb_entity: str | None = None
    wandb_log_frequency: int = 10  # optimizer steps between log lines
    log_weights_to_wandb: bool = False  # each finished SAE's files as an artifact of its run
    # saeray: at a sweep's end, pages of what makes the features of the SAEs on its frontier fire;
    # true, or a number: of tokens that are read for them (true: 262,144)
    features: bool | int = False
    n_checkpoints: int = 0
    checkpoint_every_s: float | None = 600.0  # saeray: what a crash may cost; only the newest stays
    checkpoint_path: str = "checkpoints"  # where results go when storage_path is not given
    name: str | None = None  # saeray: of the sweep; its folder is <storage_path>/<name>
    storage_path: str | None = None  # saeray: anything pyarrow.fs opens

    # The machine
    device: str = AUTO  # cpu, cuda, mps or auto; Ray says which of the GPUs
    resources: Resources = field(default_factory=Resources)
    wait_limit_s: float = 300.0  # saeray: how long any part waits for another before it says so

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        object.__setattr__(self, "compute_dtype", dtype_name(self.compute_dtype))
        object.__setattr__(self, "activation_dtype", dtype_name(self.activation_dtype))
        if not isinstance(self.device, (str, list, tuple)):
            object.__setattr__(self, "device", str(self.device))  # a torch.device
        if isinstance(self.resources, Mapping):
            object.__setattr__(self, "resources", resources_from(self.resources))
        if isinstance(self.scheduler, Mapping):
            object.__setattr__(self, "scheduler", scheduler_from(self.scheduler))
        if self.wandb_project is None:  # the guide writes None where it wants wandb's default
            object.__setattr__(self, "wandb_project", "saeray")
        for f in fields(self):
            object.__setattr__(self, f.name, in_lists(f.name, getattr(self, f.name)))
        check_types(self)
        axes = grid_axes(self)
        if self.grid is not None:
            entries = checked_entries(self.grid, type(self), NOT_AN_AXIS, dtype_name)
            object.__setattr__(self, "grid", entries)
        elif not axes:
            check_counts(self)
            for name, value in (architectures.filled(self) | recipes.filled(self)).items():
                object.__setattr__(self, name, value)
            check_values(self)
            check_scheduler(self)
        for name in axes:
            if name in NOT_AN_AXIS:
                raise bad_value(name, getattr(self, name), "one value; it can't be a grid axis.")
            if not getattr(self, name):
                raise bad_value(name, [], "an empty list makes an empty grid; give values.")

    # --- derived, in the units of the guide -------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimizer steps: training_tokens // train_batch_size."""
        return self.training_tokens // self.train_batch_size

    @property
    def block_rows(self) -> int:
        """Activations of one LM batch that are served: see `saeray.spec.stream`."""
        return block_rows(self)

    @property
    def resolved_hook_point(self) -> str:
        """`hook_point` with `{layer}` filled in from `hook_point_layer`."""
        return self.hook_point.replace("{layer}", str(self.hook_point_layer))

    @property
    def hooks_read(self) -> tuple[str, ...]:
        """The hook points whose activations a training step takes, the SAE's input first."""
        return transcoder.hooks_read(self)

    @property
    def resolved_eval_every(self) -> int:
        """Optimizer steps between evaluations during training; 0: only at the end."""
        return self.eval_every_among(1)

    def eval_every_among(self, saes: int) -> int:
        """The same for one of so many SAEs that share a pass over the text."""
        if self.eval_every is not None:
            return self.eval_every
        each = max(TRAINED_PER_EVALUATED, HARVESTED_PER_EVALUATED * saes)
        tokens = each * self.eval_windows * self.context_size
        often = self.wandb_log_frequency
        return max(10 * often, often * -(-tokens // (self.train_batch_size * often)))

    def logs_at(self, step: int) -> bool:
        """Whether an uninterrupted run has a line of this optimizer step in its log."""
        logs = step % self.wandb_log_frequency == 0 or step == self.steps
        return logs or self.evaluates_at(step)

    def evaluates_at(self, step: int) -> bool:
        """Whether an uninterrupted run is evaluated after this optimizer step."""
        every = self.resolved_eval_every
        return step == self.steps or (bool(every) and step % every == 0)

    def computes_in(self, device: str) -> str:
        """What the products of an SAE's step are made in on a kind of device.

        auto is bfloat16 on cuda where dtype is float32; only cuda has tf32. Elsewhere `dtype`.
        """
        wanted = self.compute_dtype
        if wanted == "auto" and device == "cuda" and self.dtype == "float32":
            return "bfloat16"
        if wanted == "bfloat16" or (wanted == "tf32" and device == "cuda"):
            return wanted
        return self.dtype

    def d_sae(self, d_in: int) -> int:
        """Width of the SAE: d_in * expansion_factor."""
        return round(d_in * self.expansion_factor)

    def replace(self, **changes: Any) -> LanguageModelSAERunnerConfig:
        """A copy with some fields changed, checked like a new one."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], source: str = "config"
    ) -> LanguageModelSAERunnerConfig:
        """Builds a config from plain data, refusing keys that no field has.

        Raises:
            ConfigError: an unknown key (with the nearest known ones), a missing or bad value.
        """
        try:
            return cls(**{str(key): value for key, value in data.items()})
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None


def guides_keywords_too(init: Callable[..., None]) -> Callable[..., None]:
    """`__init__` that takes what `from_dict` takes, and refuses the rest in the same words."""

    @functools.wraps(init)
    def made(self: Any, *positional: Any, **given: Any) -> None:
        if positional:
            raise ConfigError("fields are given by name: LanguageModelSAERunnerConfig(lr=…).")
        values = synthetic.completed(in_our_words(given, [f.name for f in fields(self)]))
        missing = missing_fields(type(self), values)
        if missing:
            raise ConfigError(f"{', '.join(missing)} must be given.")
        init(self, **values)

    return made


def missing_fields(cls: Any, values: Mapping[str, Any]) -> list[str]:
    """The fields without a default that have no value."""
    nothing = dataclasses.MISSING
    return [
        f.name
        for f in fields(cls)
        if f.name not in values and f.default is nothing and f.default_factory is nothing
    ]


LanguageModelSAERunnerConfig.__init__ = guides_keywords_too(  # type: ignore[method-assign]
    LanguageModelSAERunnerConfig.__init__
)

# Fields that concern the whole sweep, so a list in them means nothing.
NOT_AN_AXIS = frozenset(
    {
        "name",
        "storage_path",
        "checkpoint_path",
        "resources",
        "log_to_wandb",
        "wandb_project",
        "wandb_entity",
        "log_weights_to_wandb",
        "device",
        "buffer_bytes",
        "stream_tokens",
        "activation_cache",
        "reader_lag_s",
        "share_stream",
        "checkpoint_every_s",
        "features",
        "wait_limit_s",
        "text_version",
        "grid",
        "scheduler",
    }
)


def resolve(config: LanguageModelSAERunnerConfig) -> LanguageModelSAERunnerConfig:
    """Fills the fields whose default is another field, so the config says all it depends on.

    With a grid over `seed` the stream is seeded by its first value, and with one over
    `training_tokens` the stream is as long as the longest: every SAE of the sweep then sees the
    same rows in the same order.
    """
    seeds, tokens = all_values(config, "seed"), all_values(config, "training_tokens")
    return config.replace(
        data_seed=seeds[0] if config.data_seed is None else config.data_seed,
        stream_tokens=max(tokens) if config.stream_tokens is None else config.stream_tokens,
    )


def grid_axes(config: LanguageModelSAERunnerConfig) -> list[str]:
    """The fields that hold a list, in the order of their declaration."""
    names = [f.name for f in fields(config) if f.name != "grid"]
    return [name for name in names if isinstance(getattr(config, name), list)]


def stream_key(config: LanguageModelSAERunnerConfig) -> str:
    """A short stable digest of everything the token stream and its activations depend on."""
    return digest(stream_values(config))


def digest(data: object, length: int = 12) -> str:
    """A short stable hash of plain data."""
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def dtype_name(dtype: Any) -> Any:
    """`torch.float32` -> "float32", without importing torch; lists element by element."""
    if isinstance(dtype, (list, tuple)):
        return [dtype_name(d) for d in dtype]
    return str(dtype).removeprefix("torch.")
