"""What an SAE knows of itself, `sae.cfg`: its cfg.json, and where it was found.

Also of SAEs that sae_lens has written, whichever version: their cfg.json is brought into the form
of now, and what ours can't compute is refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from saeray.errors import ConfigError, bad_value
from saeray.files import strict_json
from saeray.files.storage import Folder
from saeray.sae.architectures.base import SAE, folded, kind_of

NOT_SAE_NAMES = ("final", "sae", "")  # folders that say nothing of the SAE in them


@dataclass(frozen=True, eq=False)
class SAECfg:
    """An SAE's kind, size, model and hook point, and all that it was trained with.

    Beside what stands here, every field of the config that it was trained with is an attribute
    (`cfg.lr`, `cfg.l1_coefficient`), and every entry of cfg.json's metadata.
    """

    data: dict[str, Any]  # cfg.json
    folder: str | None = None  # where it was loaded from
    sparsity: Tensor | None = None  # [L], log10 of the features' firing frequency

    @classmethod
    def of(cls, sae: SAE, **metadata: Any) -> SAECfg:
        """Of an SAE made by hand. metadata: model_name, hook_name, context_size …"""
        sizes = {"d_in": sae.d_in, "d_sae": sae.d_sae}
        return cls(
            {
                **kind_of(sae), **sae.SAE_LENS_CFG, **sizes, "device": "cpu",
                "apply_b_dec_to_input": True, "normalize_activations": "none",
                "reshape_activations": "none",
                "metadata": {"sae_lens_version": "6.0.0", **metadata},
            }
        )  # fmt: skip

    @property
    def metadata(self) -> dict[str, Any]:
        return self.data.get("metadata", {})

    @property
    def training_config(self) -> dict[str, Any]:
        """The whole config it was trained with, flat; empty where saeray has not trained it."""
        return self.metadata.get("training_config") or {}

    @property
    def architecture(self) -> str:
        """As it was trained: batchtopk, say, where what it computes now is called jumprelu."""
        return self.training_config.get("architecture") or self.data["architecture"]

    @property
    def d_in(self) -> int:
        return self.data["d_in"]

    @property
    def d_sae(self) -> int:
        return self.data["d_sae"]

    @property
    def model_name(self) -> str | None:
        return self.metadata.get("model_name")

    @property
    def hook_name(self) -> str | None:
        return self.metadata.get("hook_name")

    hook_point = hook_name  # as the guide calls it

    @property
    def hook_name_out(self) -> str | None:
        """Of a transcoder: what it reconstructs."""
        out = self.metadata.get("hook_name_out")
        return out or self.training_config.get("hook_point_out")

    @property
    def name(self) -> str | None:
        """The SAE's in its sweep, or that of its folder."""
        if self.folder is None:
            return None
        parts = self.folder.partition("?")[0].rstrip("/").split("/")
        if "trials" in parts[-4:]:
            at = len(parts) - 1 - parts[::-1].index("trials")
            return parts[at + 1] if at + 1 < len(parts) else None
        return next((p for p in reversed(parts) if p not in NOT_SAE_NAMES), None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "data":  # while it is unpickled there is none
            raise AttributeError(name)
        for place in (self.data, self.metadata, self.training_config):
            if name in place:
                return place[name]
        raise AttributeError(f"an SAE's cfg has no {name!r}")

    @property
    def described(self) -> tuple[str, str]:
        """For a line: its name, and where it belongs and lies."""
        out = f" to {self.hook_name_out}" if self.hook_name_out else ""
        model = str(self.model_name)
        model = model.rpartition("/")[2] if model.startswith(("/", "~")) else model
        at = f" at {self.hook_name}{out} of {model}" if self.hook_name else ""
        return (
            f" {self.name}" if self.name else "",
            at + (f", in {self.folder}" if self.folder else ""),
        )

    def save(self, sae: SAE, folder: str | os.PathLike[str]) -> None:
        """cfg.json, the weights and what is known of the features' frequency."""
        place = Folder.at(folder, "folder")
        for name, content in self.files(sae).items():
            place.write(name, content)

    def files(self, sae: SAE) -> dict[str, bytes]:
        """What `save` writes, by name."""
        now = {"d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": dtype_name(sae.dtype)}
        text = strict_json.dumps(self.data | kind_of(sae) | now, indent=2, sort_keys=True) + "\n"
        weights = {n: t.detach().cpu().contiguous() for n, t in sae.sae_lens_tensors().items()}
        files = {"cfg.json": text.encode(), "sae_weights.safetensors": save(weights)}
        if self.sparsity is not None:
            files["sparsity.safetensors"] = save({"sparsity": self.sparsity.cpu().contiguous()})
        return files


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


METADATA = (
    "model_name", "hook_name", "hook_head_index", "context_size", "prepend_bos", "dataset_path",
)  # fmt: skip
RENAMED = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}


def in_the_form_of_now(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A cfg.json of any version of sae_lens, as version 6 and saeray write it.

    Raises:
        ConfigError: an SAE that computes what none of ours does; says which entry tells so.
    """
    if "metadata" not in cfg:  # before version 6
        cfg = {RENAMED.get(name, name): value for name, value in cfg.items()}
        kwargs = cfg.get("activation_fn_kwargs") or {}
        if str(cfg.get("activation_fn", "")).startswith("topk") and "k" in kwargs:
            cfg |= {"architecture": "topk", "k": kwargs["k"]}
        cfg["metadata"] = {name: cfg[name] for name in METADATA if name in cfg}
    data = {"architecture": "standard", **cfg}
    scaling = data.get("normalize_activations")
    if scaling not in (None, False, "none"):
        raise bad_value(
            "normalize_activations", scaling, "in its cfg.json; activations are given as they are."
        )
    return data


def weights_of_now(cfg: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors beside a cfg.json, for what ours compute: b_dec taken off x, nothing rescaled.

    Raises:
        ConfigError: a factor on the latents, as finetuning leaves one.
    """
    tensors = dict(tensors)
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not bool((factor == 1).all()):
        raise ConfigError(
            "scaling_factor: its latents are multiplied by factors of their own (finetuned), which "
            "ours are not."
        )
    if not cfg.get("apply_b_dec_to_input", True) and not is_transcoder(cfg):
        # x W + b = (x - b_dec) W + (b + b_dec W)
        shift = tensors["b_dec"] @ tensors["W_enc"]
        for name in {"b_enc", "b_gate"} & tensors.keys():
            tensors[name] = tensors[name] + shift
        if "b_mag" in tensors:
            tensors["b_mag"] = tensors["b_mag"] + shift * tensors["r_mag"].exp()
    return tensors


def as_loaded(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What a cfg.json says of an SAE once it was loaded, however it was written."""
    told = {"apply_b_dec_to_input": not is_transcoder(cfg), "normalize_activations": "none"}
    return {**cfg, **told}


def is_transcoder(cfg: Mapping[str, Any]) -> bool:
    """Its b_dec is its output's alone."""
    return cfg["architecture"].endswith("transcoder")


def without_rescaling(cfg: dict[str, Any], sae: SAE) -> SAE:
    """Norms folded in where a topk counts h with its decoder row's norm."""
    return sae.with_tensors(folded(sae)) if cfg.get("rescale_acts_by_decoder_norm") else sae
