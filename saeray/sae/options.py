"""What a training step depends on beside the weights and the batch: plain numbers, no config."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Of one SAE. Which of the last block an architecture reads stands in its own file."""

    lr: float
    total_steps: int
    lr_scheduler_name: str = "constantwithwarmup"
    lr_warm_up_steps: int = 500
    lr_end: float = 0.0
    num_cycles: int = 1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    mse_normalization: str = "centred_norm"
    decoder_norm: str = "unit"
    l1_warm_up_steps: int = 0  # of whichever coefficient the architecture has
    lr_decay_steps: int = 0
    gradient_clip: float = 0.0  # of the norm of all parameters' gradient; 0: none
    compute_dtype: str = "float32"  # of the products: dtype, tf32 or bfloat16
    feature_sampling_window: int = 2000
    dead_feature_window: int = 1000
    dead_feature_threshold: float = 1e-8

    architecture: str = "standard"
    l1_coefficient: float = 0.0
    target_l0: float = 0.0  # what the coefficient is steered to; in quadratic jumprelu its L0*
    use_ghost_grads: bool = False
    feature_sampling_method: str | None = None
    seed: int = 0  # of what is drawn in training: which rows dead features are resampled to
    # p_anneal
    p_end: float = 0.2
    p_anneal_start_step: int = 0
    p_updates: int = 10
    gated_aux_decoder: str = "live"  # gated
    # topk, batchtopk, matryoshka
    k: float = 0.0
    auxk_coefficient: float = 1 / 32
    auxk_scaling: str = "residual_variance"
    topk_threshold_rate: float = 0.01
    matryoshka_widths: tuple[int, ...] = ()  # the last one is d_sae
    # jumprelu
    l0_coefficient: float = 0.0
    jumprelu_sparsity_loss_mode: str = "step"
    jumprelu_init_threshold: float = 0.01
    jumprelu_bandwidth: float = 0.05
    jumprelu_tanh_scale: float = 4.0
    jumprelu_ste_to_input: bool = False
    pre_act_loss_coefficient: float = 0.0
