"""Activation cache: harvested blocks as Arrow IPC files, so the next sweep need not harvest them.

    <cache>/<digest of the identity>/
      manifest.json                        the identity: model, revision, weights, text, seed, dtype
      <hook point>/00000012.arrow          block 12: [rows, d_in], with its checksums in the schema

Blocks do not depend on how the buffer mixes them, how long the stream is or which SAEs are trained,
so sweeps that differ in these share them. A block is used only when its identity, the tokens it
was made of and its checksum are right; any other is harvested again and replaced.

Versions up to 0.1 told models apart by 1,024 values of each tensor. What they left is still read,
with a warning, where there is nothing of the full identity; new blocks go under that.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import numpy as np
import pyarrow as pa

from saeray.files import strict_json
from saeray.files.storage import Folder
from saeray.spec.config import LanguageModelSAERunnerConfig, digest
from saeray.spec.stream import row_values

FORMAT = 2
# What a block is a function of, beside the model's weights and the kind of device.
FIELDS_UP_TO_0_1 = (
    "model_name",
    "model_revision",
    "dataset_path",
    "dataset_split",
    "dataset_config",
    "text_column",
    "prepend_bos",
    "data_seed",
    "eval_windows",
    "context_size",
    "store_batch_size",
    "activation_dtype",
)
IDENTITY_FIELDS = FIELDS_UP_TO_0_1
WHERE_GIVEN = ("dataset_revision", "txt_documents")  # which came later: older caches are read on


def identities_of(
    config: LanguageModelSAERunnerConfig,
    weights: tuple[str, str],
    device: str,
    widths: dict[str, int],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What makes two harvests of a block the same, and what versions up to 0.1 had for that.

    weights: fingerprints of the model's, in full and as those versions made them.
    """
    full, sampled = weights
    given = {name: value for name in WHERE_GIVEN if (value := getattr(config, name)) is not None}
    given |= row_values(config)
    rest = {
        **given,
        "device": device,
        "block_shapes": {hook: [config.block_rows, d_in] for hook, d_in in widths.items()},
    }
    now = {name: getattr(config, name) for name in IDENTITY_FIELDS}
    before = {name: getattr(config, name) for name in FIELDS_UP_TO_0_1}
    return (
        {"format": FORMAT, **now, "weights": full, **rest},
        {"format": 1, **before, "weights": sampled, **rest},
    )


class Unusable(Exception):
    """A file of the cache that must not be used, with the reason."""


class ActivationCache:
    """The blocks of one stream's identity. Files that are no good are named in `warnings`."""

    def __init__(
        self,
        uri: str,
        identity: dict[str, Any],
        earlier: dict[str, Any] | None = None,
        read_only: bool = False,
    ) -> None:
        """earlier: the identity that versions up to 0.1 had for the same stream."""
        # Each hook point stands for itself: a sweep at one of them reads what another left at two.
        self.identity = {k: v for k, v in identity.items() if k != "block_shapes"}
        self.digest = digest(self.identity, 16)
        self.shapes: dict[str, list[int]] = identity["block_shapes"]
        self.folder = Folder.at(uri) / self.digest
        self.warnings: list[str] = []
        self.earlier = None if earlier is None else self.left_by_earlier(uri, earlier)
        self.described = read_only
        if self.earlier is None:
            self.describe()

    def left_by_earlier(self, uri: str, identity: dict[str, Any]) -> ActivationCache | None:
        cache = ActivationCache(uri, identity, read_only=True)
        if "manifest.json" not in cache.folder.names():
            return None
        cache.warnings = self.warnings
        self.warnings.append(
            f"{cache.folder.uri}: blocks of an earlier version, which compared a part of a model's "
            "weights only, are used; delete it if the model has changed since."
        )
        return cache

    def describe(self) -> None:
        """Writes the manifest, before the first block at the latest."""
        if not self.described:
            self.write_manifest(self.identity)
            self.described = True

    def write_manifest(self, identity: dict[str, Any]) -> None:
        """Writes the manifest; hook points that an earlier sweep has listed stay listed."""
        found = self.read_manifest()
        shapes = found.pop("block_shapes", {})
        if found and found != identity:
            self.warnings.append(f"{self.folder.uri}: manifest of another stream; written anew.")
            found = {}
        if not found or shapes != shapes | self.shapes:
            manifest = identity | {"block_shapes": shapes | self.shapes}
            text = strict_json.dumps(manifest, indent=2) + "\n"
            self.folder.write("manifest.json", text.encode())

    def read_manifest(self) -> dict[str, Any]:
        if "manifest.json" not in self.folder.names():
            return {}
        try:
            found = strict_json.loads(self.folder.read("manifest.json"))
            return found if isinstance(found["block_shapes"], dict) else {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.warnings.append(
                f"{self.folder.uri}: the manifest is damaged ({error}); written anew."
            )
            return {}

    def place(self, hook: str, block: int) -> tuple[Folder, str]:
        return self.folder / re.sub(r"[^A-Za-z0-9._-]", "_", hook), f"{block:08d}.arrow"

    def read(self, hooks: list[str], block: int, tokens: np.ndarray) -> list[np.ndarray] | None:
        """The block at every hook point [rows, d_in], or None where one is missing or no good."""
        arrays = []
        for hook in hooks:
            folder, name = self.place(hook, block)
            try:
                data = folder.read(name)
            except OSError:  # not there (or not to be had: then it is harvested as well)
                return None if self.earlier is None else self.earlier.read(hooks, block, tokens)
            try:
                arrays.append(unpacked(data, self.about(hook, block, tokens)))
            except Unusable as reason:
                self.warnings.append(f"{folder.uri}/{name}: {reason}; harvested again.")
                return None
        return arrays

    def write(self, hook: str, block: int, tokens: np.ndarray, array: np.ndarray) -> None:
        """Publishes one block at one hook point; array [rows, d_in]."""
        self.describe()
        folder, name = self.place(hook, block)
        folder.write(name, packed(array, self.about(hook, block, tokens)))

    def about(self, hook: str, block: int, tokens: np.ndarray) -> dict[str, Any]:
        return {
            "identity": self.digest,
            "hook": hook,
            "block": block,
            "tokens": checksum(tokens),
            "shape": self.shapes[hook],
        }


def packed(array: np.ndarray, about: dict[str, Any]) -> bytes:
    """An Arrow IPC file with one column of fixed-size lists [d_in] and a row per activation."""
    values = pa.array(np.ascontiguousarray(array).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, array.shape[1])
    note = strict_json.dumps(about | {"sha256": checksum(array)}, sort_keys=True)
    schema = pa.schema([pa.field("activations", column.type)], metadata={"saeray": note})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([column], schema=schema))
    return sink.getvalue().to_pybytes()


def unpacked(data: bytes, about: dict[str, Any]) -> np.ndarray:
    """The inverse of `packed`, after every comparison.

    Raises:
        Unusable: cut off, changed, or of another block, text or model than `about` says.
    """
    try:
        with pa.ipc.open_file(pa.BufferReader(data)) as reader:
            note = strict_json.loads((reader.schema.metadata or {})[b"saeray"])
            column = reader.get_batch(0).column(0)
            array = column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), -1)
    except (pa.ArrowException, KeyError, ValueError, IndexError, OSError) as error:
        raise Unusable(f"damaged ({type(error).__name__})") from None
    expected = note.pop("sha256", None)
    if note != about:
        other = sorted(k for k in about if note.get(k) != about[k])
        raise Unusable(f"of another stream (its {', '.join(other) or 'description'} differs)")
    if list(array.shape) != about["shape"] or checksum(array) != expected:
        raise Unusable("it does not have the checksum it was written with")
    return array


def checksum(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
