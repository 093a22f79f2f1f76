"""What an SAE of any architecture is: its weights and its forward pass.

How one is trained is its *rule* (`rule`). Any of them can be a *transcoder*: it reads x at one
place and reconstructs y at another, which may be of another width, with a bias b_dec_out of its own
and, where it has a skip connection, x W_skip (Dunefsky et al., 2406.11944; Paulo et al.,
2501.18823). To a rule it is the same.

D = d_in, L = d_sae, O = d_out (D but in a transcoder).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")
OF_OUTPUT = ("b_dec_out", "W_skip")  # of a transcoder; the second where it has a skip connection


class SAE(nn.Module):
    """f = latents((x - b_dec) W_enc + b_enc)        x̂ = f W_dec + b_dec

    A transcoder: ŷ = f W_dec + b_dec_out, and + x W_skip where it has a skip connection.

    Shapes: x, x̂ [..., D]; f [..., L]; W_enc [D, L]; W_dec [L, D]; b_enc [L]; b_dec [D]. Of a
    transcoder ŷ [..., O]; W_dec [L, O]; b_dec_out [O]; W_skip [D, O]. Training works on the weights
    directly (`saeray.sae.trainer`).
    """

    architecture: str  # as sae_lens calls what this computes; of a class, what it is without y
    EXTRA: ClassVar[tuple[str, ...]] = ()  # parameters [L] beside the four
    SETTINGS: ClassVar[tuple[str, ...]] = ()  # numbers that it is a function of beside those
    SAE_LENS_CFG: ClassVar[dict[str, Any]] = {}  # what sae_lens wants to be told beside them

    cfg: Any = None  # of one that was loaded: where it belongs (saeray.files.sae_cfg.SAECfg)

    def __init__(
        self,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        *,
        b_dec_out: Tensor | None = None,
        W_skip: Tensor | None = None,
        **others: Any,
    ) -> None:
        """Takes the tensors; W_enc's memory is a row per feature, as W_dec's is.

        b_dec_out: of a transcoder, W_skip only of one. others: a tensor [L] for each of EXTRA and a
        number for each of SETTINGS.

        Raises:
            ValueError: shapes that do not belong together, or other names than these.
        """
        super().__init__()
        d_in, d_sae = W_enc.shape
        d_out = d_in if b_dec_out is None else len(b_dec_out)
        shapes = (tuple(W_dec.shape), tuple(b_enc.shape), tuple(b_dec.shape))
        if shapes != ((d_sae, d_out), (d_sae,), (d_in,)):
            raise ValueError(
                f"W_enc [{d_in}, {d_sae}] needs W_dec [{d_sae}, {d_out}], b_enc [{d_sae}], "
                f"b_dec [{d_in}]; got {shapes}"
            )
        if W_skip is not None and (b_dec_out is None or tuple(W_skip.shape) != (d_in, d_out)):
            raise ValueError(
                f"W_skip [{d_in}, {d_out}] is wanted, with a b_dec_out; got {tuple(W_skip.shape)}"
            )
        if set(others) != {*self.EXTRA, *self.SETTINGS}:
            wanted = ", ".join((*self.EXTRA, *self.SETTINGS)) or "nothing"
            raise ValueError(
                f"{type(self).__name__} takes {wanted} beside {', '.join(PARAMETERS)}; "
                f"got {', '.join(others) or 'nothing'}"
            )
        # What a feature reads lies together: a step that touches few features touches few rows.
        self.W_enc = nn.Parameter(W_enc.t().contiguous().t(), requires_grad=False)
        self.W_dec = nn.Parameter(W_dec, requires_grad=False)
        self.b_enc = nn.Parameter(b_enc, requires_grad=False)
        self.b_dec = nn.Parameter(b_dec, requires_grad=False)
        self.b_dec_out = as_parameter(b_dec_out)
        self.W_skip = as_parameter(W_skip)
        if b_dec_out is not None:
            self.architecture = transcoder_name(type(self).architecture, W_skip is not None)
        for name in self.EXTRA:
            if tuple(others[name].shape) != (d_sae,):
                raise ValueError(f"{name} [{d_sae}] is wanted; got {tuple(others[name].shape)}")
            setattr(self, name, nn.Parameter(others[name], requires_grad=False))
        for name in self.SETTINGS:
            setattr(self, name, others[name])

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def is_transcoder(self) -> bool:
        return self.b_dec_out is not None

    @property
    def b_out(self) -> Tensor:
        """What is added to the decoded: [O]."""
        return self.b_dec if self.b_dec_out is None else self.b_dec_out

    @property
    def common(self) -> tuple[str, ...]:
        """The names of the parameters that it has whatever its architecture."""
        return PARAMETERS + tuple(n for n in OF_OUTPUT if getattr(self, n) is not None)

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc.dtype

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    def __repr__(self) -> str:
        name, place = self.cfg.described if self.cfg is not None else ("", "")
        kind = self.architecture if self.cfg is None else self.cfg.architecture
        return f"<SAE{name}: {kind} {self.d_in} -> {self.d_sae}{place}>"

    def save(self, folder: Any) -> None:
        """Writes what `saeray.load_sae` and sae_lens load: cfg.json and weights, as they are now.

        folder: a path or URI; other files there stay.

        Raises:
            ValueError: it has no `cfg`, so nothing is known of the model it belongs to.
        """
        if self.cfg is None:
            raise ValueError(
                "this SAE has no cfg (its model and hook point); those of saeray.load_sae have, "
                "and for one made by hand: sae.cfg = saeray.SAECfg.of(sae, model_name=…, "
                "hook_name=…)."
            )
        self.cfg.save(self, folder)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All parameters by name."""
        return {name: getattr(self, name) for name in (*self.common, *self.EXTRA)}

    @property
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.SETTINGS}

    def with_tensors(self, tensors: dict[str, Tensor]) -> SAE:
        """One of the same kind with these in the place of its own."""
        return type(self)(**{**self.tensors, **tensors}, **self.settings)

    def for_unscaled(self, scale: float, of_output: float = 1.0) -> SAE:
        """The same function of x where this SAE is one of scale * x, in x's own units.

        h stays what it is, so all that is [L] does: W_enc scaled up, W_dec and b_dec down. A
        transcoder's y is scaled by of_output, and so is what it writes.
        """
        write = of_output if self.is_transcoder else scale
        if scale == write == 1.0:
            return self
        tensors = {
            "W_enc": self.W_enc * scale,
            "W_dec": self.W_dec / write,
            "b_enc": self.b_enc.clone(),
            "b_dec": self.b_dec / scale,
        }
        if self.b_dec_out is not None:
            tensors["b_dec_out"] = self.b_dec_out / write
        if self.W_skip is not None:
            tensors["W_skip"] = self.W_skip * (scale / write)
        return self.with_tensors(tensors)

    def without_centre(self) -> SAE:
        """As a transcoder is published: b_dec, which its input loses, is taken into b_enc.

        It is zero then: a published transcoder has one bias for its output and one for features.
        """
        if not self.is_transcoder:
            return self
        moved = self.b_dec @ self.W_enc
        tensors = {"b_enc": self.b_enc - moved, "b_dec": torch.zeros_like(self.b_dec)}
        return self.with_tensors(tensors | self.moved_centre(moved))

    def moved_centre(self, moved: Tensor) -> dict[str, Tensor]:
        """What else changes where b_dec W_enc [L] is taken out of b_enc."""
        return {}

    def latents(self, h: Tensor) -> Tensor:
        """Pre-activations h [..., L] -> feature activations f [..., L]."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """x [..., D] -> feature activations f [..., L]."""
        return self.latents((x.to(self.W_enc.dtype) - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, f: Tensor) -> Tensor:
        """f [..., L] -> reconstruction x̂ [..., D]; of a transcoder ŷ, without what is skipped."""
        return f @ self.W_dec + self.b_out

    def reconstruct(self, x: Tensor, f: Tensor) -> Tensor:
        """x [..., D] and its features f [..., L] -> reconstruction [..., O]."""
        found = self.decode(f)
        return found if self.W_skip is None else found + x.to(self.W_skip.dtype) @ self.W_skip

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> reconstruction [..., O]."""
        return self.reconstruct(x, self.encode(x))

    def sae_lens_tensors(self) -> dict[str, Tensor]:
        """The parameters under the names that sae_lens loads them by.

        Of a transcoder as it is published: its b_dec is the output's there.
        """
        tensors = self.tensors
        if "b_dec_out" in tensors:
            tensors["b_dec"] = tensors.pop("b_dec_out")
        if "W_skip" in tensors:
            tensors["W_skip"] = tensors["W_skip"].t()  # [O, D]
        return tensors

    @classmethod
    def from_sae_lens(cls, tensors: dict[str, Tensor], cfg: dict[str, Any]) -> SAE:
        """The SAE that `sae_lens_tensors` and cfg.json describe."""
        named = {n: tensors[n] for n in (*PARAMETERS, *cls.EXTRA)}
        if cfg["architecture"].endswith(TRANSCODER):
            named["b_dec_out"] = named["b_dec"]
            named["b_dec"] = named["W_enc"].new_zeros(len(named["W_enc"]))
            if "W_skip" in tensors:
                named["W_skip"] = tensors["W_skip"].t().contiguous()
        return cls(**named, **{n: cfg[n] for n in cls.SETTINGS})


TRANSCODER = "transcoder"  # what their names end with


def transcoder_name(architecture: str, skip: bool) -> str:
    """What sae_lens calls a transcoder of an architecture, or would where it has none of it."""
    base = "" if architecture == "standard" else f"{architecture}_"
    return f"{base}{'skip_' if skip else ''}{TRANSCODER}"


def as_parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


def kind_of(sae: SAE) -> dict[str, Any]:
    """What a cfg.json says of an SAE's kind: enough to make it of its tensors again."""
    return {"architecture": sae.architecture, **sae.settings}


def folded(sae: SAE) -> dict[str, Tensor]:
    """The same function with decoder rows of norm 1: h, and what is in its unit, times the norm."""
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    return {
        "W_enc": sae.W_enc * norms,
        "W_dec": sae.W_dec / norms.unsqueeze(1),
        "b_enc": sae.b_enc * norms,
        "b_dec": sae.b_dec.clone(),
        **{n: getattr(sae, n).clone() for n in sae.common if n in OF_OUTPUT},
    }
