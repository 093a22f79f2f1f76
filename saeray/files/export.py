"""A trained SAE in the formats of other packages, where they need more than `final/` is.

    sae_lens             cfg.json, sae_weights.safetensors, sparsity.safetensors: as `final/`
    dictionary_learning  ae.pt and config.json, as its trainers leave them
    saebench             as sae_lens, with decoder rows of norm 1 and all that SAEBench asks a cfg

What a format can't hold is refused by name.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saeray.errors import ConfigError, bad_value, nearest
from saeray.files import strict_json
from saeray.sae.architectures.base import SAE, folded
from saeray.spec.architectures import widths_of
from saeray.spec.synthetic import is_synthetic
from saeray.spec.transcoder import layer_of

Files = dict[str, bytes]  # by name


def exported(sae: SAE, form: str) -> Files:
    """An SAE that was loaded (it has a `cfg`) as the files of a format.

    Raises:
        ConfigError: no such format, or one that can't hold this SAE; says what it is that it can't.
    """
    if form not in FORMATS:
        raise bad_value("format", form, nearest(form, FORMATS))
    return FORMATS[form](sae)


def as_sae_lens(sae: SAE) -> Files:
    return sae.cfg.files(sae)


# --- SAEBench ---------------------------------------------------------------------------------


def as_saebench(sae: SAE) -> Files:
    """What SAEBench loads with `SAE.load_from_disk`, with what it reads of a cfg.

    It wants decoder rows of norm 1, so that latents of different SAEs are in one unit.
    """
    cfg = sae.cfg
    refuse_transcoder(sae, "saebench")
    if is_synthetic(cfg.model_name or ""):
        raise bad_value("model_name", cfg.model_name, "SAEBench needs a language model.")
    if re.search(r"hook_(q|k|v)$", cfg.hook_name or ""):
        raise bad_value("hook_point", cfg.hook_name, "SAEBench has no way to join its heads.")
    for name in ("model_name", "hook_name", "context_size"):
        if cfg.metadata.get(name) is None:
            raise ConfigError(f"{name}: SAEBench needs it, and the SAE's cfg.json has none.")
    sae = with_unit_rows(sae)
    metadata = {"hook_layer": layer_of(cfg.hook_name), "hook_head_index": None, **cfg.metadata}
    return type(cfg)(cfg.data | {"metadata": metadata}, cfg.folder, cfg.sparsity).files(sae)


def with_unit_rows(sae: SAE) -> SAE:
    """The same reconstruction with decoder rows of norm 1; latents are in that unit then.

    A feature whose row is zero reconstructs nothing, and gets a row and never fires. The k of a
    topk are chosen before the norms, so there they must be 1 already.

    Raises:
        ConfigError: a topk whose rows are not of norm 1.
    """
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
    if "k" in sae.SETTINGS and not torch.allclose(norms, torch.ones_like(norms), atol=1e-4):
        raise ConfigError(
            "decoder_norm: the k largest are chosen among latents of other norms than 1, which "
            "this format can't hold."
        )
    tensors = dict(sae.tensors) | folded(sae)
    of_rows = torch.where(norms > 0, norms, torch.ones_like(norms))
    for name in ("threshold", "b_mag"):
        if name in tensors:
            tensors[name] = tensors[name] * of_rows
    silent = norms == 0
    if bool(silent.any()):
        row = torch.zeros_like(sae.W_dec[0])
        row[0] = 1.0
        tensors["W_dec"] = torch.where(silent.unsqueeze(1), row, tensors["W_dec"])
        tensors["W_enc"] = torch.where(silent, torch.zeros_like(sae.W_enc), tensors["W_enc"])
        for name in ("b_enc", "b_mag"):
            if name in tensors:
                tensors[name] = torch.where(silent, -torch.ones_like(norms), tensors[name])
    unit = sae.with_tensors(tensors)
    unit.cfg = sae.cfg
    return unit


def refuse_transcoder(sae: SAE, form: str) -> None:
    if sae.cfg.hook_name_out not in (None, sae.cfg.hook_name):
        raise bad_value(
            "hook_point_out", sae.cfg.hook_name_out, f"{form} holds autoencoders, no transcoders."
        )


# --- dictionary_learning ----------------------------------------------------------------------


def as_dictionary_learning(sae: SAE) -> Files:
    """ae.pt, the state of one of its classes, and config.json, which says of which.

    The architecture that an SAE was trained as decides the class; one that saeray has not trained
    goes by what it computes. Its classes are made in float32.
    """
    refuse_transcoder(sae, "dictionary_learning")
    if sae.dtype == torch.float64:
        raise bad_value("dtype", "float64", "dictionary_learning's SAEs are made in float32.")
    architecture = sae.cfg.architecture
    trainer = TRAINERS.get(architecture) or TRAINERS[sae.architecture]
    state, own = trainer(sae)
    state = {n: t.detach().cpu().contiguous().clone() for n, t in state.items()}
    file = io.BytesIO()
    torch.save(state, file)
    cfg = sae.cfg
    given = cfg.training_config
    config = {
        "trainer": own
        | {
            "activation_dim": sae.d_in,
            "dict_size": sae.d_sae,
            "lr": given.get("lr"),
            "steps": steps_of(given),
            "warmup_steps": given.get("lr_warm_up_steps"),
            "sparsity_warmup_steps": given.get("l1_warm_up_steps"),
            "decay_start": decay_start(given),
            "seed": given.get("seed"),
            "device": "cpu",
            "layer": layer_of(cfg.hook_name),
            "lm_name": cfg.model_name,
            "wandb_name": cfg.name,
            "submodule_name": cfg.hook_name,
        },
        "buffer": {
            "d_submodule": sae.d_in,
            "io": "out",
            "ctx_len": cfg.metadata.get("context_size"),
            "out_batch_size": given.get("train_batch_size"),
            "refresh_batch_size": given.get("store_batch_size"),
            "device": "cpu",
        },
    }
    text = strict_json.dumps(config, indent=4) + "\n"
    return {"config.json": text.encode(), "ae.pt": file.getvalue()}


State = tuple[dict[str, Tensor], dict[str, Any]]  # of its class, and of its trainer


def linear(sae: SAE) -> dict[str, Tensor]:
    return {"encoder.weight": sae.W_enc.t(), "decoder.weight": sae.W_dec.t()}


def auto_encoder(sae: SAE) -> State:
    # It scales decoder rows to norm 1 when it loads them, and divides by them.
    sae = with_unit_rows(sae)
    given = sae.cfg.training_config
    own: dict[str, Any] = {"trainer_class": "StandardTrainer", "dict_class": "AutoEncoder"}
    own |= {"l1_penalty": given.get("l1_coefficient"), "resample_steps": None}
    return linear(sae) | {"encoder.bias": sae.b_enc, "bias": sae.b_dec}, own


def p_anneal(sae: SAE) -> State:
    state, own = auto_encoder(sae)
    given = sae.cfg.training_config
    del own["l1_penalty"]
    return state, own | {
        "trainer_class": "PAnnealTrainer",
        "sparsity_function": "Lp^p",
        "sparsity_penalty": given.get("l1_coefficient"),
        "p_start": 1,
        "p_end": given.get("p_end"),
        "anneal_start": given.get("p_anneal_start_step"),
        "n_sparsity_updates": given.get("p_updates"),
        "sparsity_queue_length": 10,
    }


def gated(sae: SAE) -> State:
    named = sae.sae_lens_tensors()
    state = linear(sae) | {
        "decoder_bias": sae.b_dec,
        "r_mag": named["r_mag"],
        "gate_bias": named["b_gate"],
        "mag_bias": named["b_mag"],
    }
    own = {"trainer_class": "GatedSAETrainer", "dict_class": "GatedAutoEncoder"}
    return state, own | {"l1_penalty": sae.cfg.training_config.get("l1_coefficient")}


def topk(sae: SAE) -> State:
    own = {"trainer_class": "TopKTrainer", "dict_class": "AutoEncoderTopK"}
    return with_k(sae, own, float(sae.settings["k"]), threshold=-1.0)


def batchtopk(sae: SAE) -> State:
    own = {"trainer_class": "BatchTopKTrainer", "dict_class": "BatchTopKSAE"}
    return with_k(sae, own, k_of(sae, "BatchTopKSAE"), the_threshold(sae))


def matryoshka(sae: SAE) -> State:
    k, threshold = k_of(sae, "MatryoshkaBatchTopKSAE"), the_threshold(sae)
    widths = widths_of(sae.cfg.training_config.get("matryoshka_widths"), sae.d_sae)
    sizes = [b - a for a, b in zip((0, *widths), widths, strict=False)]
    state = {n: getattr(sae, n) for n in ("W_enc", "W_dec", "b_enc", "b_dec")}
    state |= numbers(k, threshold) | {"group_sizes": torch.tensor(sizes)}
    return state, {
        "trainer_class": "MatryoshkaBatchTopKTrainer",
        "dict_class": "MatryoshkaBatchTopKSAE",
        "k": k,
        "group_sizes": sizes,
        "group_fractions": [size / sae.d_sae for size in sizes],
        "group_weights": [1.0] * len(sizes),
        **auxk(sae),
    }


def jump_relu(sae: SAE) -> State:
    # Loaded, it takes no b_dec off x: h = x W + (b - b_dec W).
    W, b_dec = sae.W_enc.double(), sae.b_dec.double()
    b_enc = (sae.b_enc.double() - b_dec @ W).to(sae.dtype)
    state = {n: getattr(sae, n) for n in ("W_enc", "W_dec", "b_dec", "threshold")}
    given = sae.cfg.training_config
    return state | {"b_enc": b_enc}, {
        "trainer_class": "JumpReluTrainer",
        "dict_class": "JumpReluAutoEncoder",
        "bandwidth": given.get("jumprelu_bandwidth"),
        "sparsity_penalty": given.get("l0_coefficient"),
        "target_l0": given.get("target_l0"),
    }


def with_k(sae: SAE, own: dict[str, Any], k: float, threshold: float) -> State:
    state = linear(sae) | {"encoder.bias": sae.b_enc, "b_dec": sae.b_dec}
    return state | numbers(int(k), threshold), own | {"k": int(k), **auxk(sae)}


def numbers(k: int, threshold: float) -> dict[str, Tensor]:
    """As its classes keep them, beside the weights; a threshold below 0: there is none yet."""
    return {
        "k": torch.tensor(k, dtype=torch.int),
        "threshold": torch.tensor(threshold, dtype=torch.float32),
    }


def auxk(sae: SAE) -> dict[str, Any]:
    given = sae.cfg.training_config
    rate = given.get("topk_threshold_rate")
    return {
        "auxk_alpha": given.get("auxk_coefficient"),
        "threshold_beta": None if rate is None else 1 - rate,
        "threshold_start_step": 0,
    }


def k_of(sae: SAE, kind: str) -> int:
    """Raises a `ConfigError` where the mean over a batch is no whole number."""
    k = sae.cfg.training_config.get("k") or sae.cfg.training_config.get("target_l0")
    if k is None or int(k) != k:
        raise bad_value("k", k, f"dictionary_learning's {kind} holds whole numbers.")
    return int(k)


def the_threshold(sae: SAE) -> float:
    """Raises a `ConfigError` where features have thresholds of their own."""
    threshold = sae.tensors["threshold"]
    if bool((threshold != threshold[0]).any()):
        raise ConfigError("threshold: features have their own, and this class holds one for all.")
    return float(threshold[0])


def steps_of(given: dict[str, Any]) -> int | None:
    tokens, batch = given.get("training_tokens"), given.get("train_batch_size")
    return tokens // batch if tokens and batch else None


def decay_start(given: dict[str, Any]) -> int | None:
    steps, decay = steps_of(given), given.get("lr_decay_steps")
    return steps - decay if steps and decay else None


TRAINERS: dict[str, Callable[[SAE], State]] = {
    "standard": auto_encoder,
    "p_anneal": p_anneal,
    "gated": gated,
    "topk": topk,
    "batchtopk": batchtopk,
    "matryoshka": matryoshka,
    "jumprelu": jump_relu,
}
FORMATS: dict[str, Callable[[SAE], Files]] = {
    "sae_lens": as_sae_lens,
    "dictionary_learning": as_dictionary_learning,
    "saebench": as_saebench,
}
