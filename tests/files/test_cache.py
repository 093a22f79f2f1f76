"""The activation cache: files that say what they are, and a second sweep that harvests nothing."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.configs import config

from saeray.files.cache import ActivationCache, identities_of
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve

HOOK = "blocks.0.hook_resid_pre"
IDENTITY = {"format": 1, "model_name": "m", "weights": "w", "block_shapes": {HOOK: [6, 4]}}
TOKENS = np.arange(6, dtype=np.int32).reshape(2, 3)
BLOCK = np.arange(24, dtype=np.float32).reshape(6, 4)


@pytest.fixture
def cache(tmp_path):
    cache = ActivationCache(str(tmp_path), IDENTITY)
    cache.write(HOOK, 3, TOKENS, BLOCK)
    return cache


def file_of(cache, block=3):
    folder, name = cache.place(HOOK, block)
    return Path(folder.path) / name


def test_a_block_comes_back_as_it_was(cache):
    (array,) = cache.read([HOOK], 3, TOKENS)
    assert array.dtype == np.float32
    assert (array == BLOCK).all()
    assert cache.read([HOOK], 4, TOKENS) is None  # not there: no reason to warn
    assert cache.warnings == []


@pytest.mark.parametrize("dtype", [np.float16, np.int16])  # int16: the bits of bfloat16
def test_other_dtypes_keep_their_bits(tmp_path, dtype):
    cache = ActivationCache(str(tmp_path), IDENTITY)
    cache.write(HOOK, 0, TOKENS, BLOCK.astype(dtype))
    (array,) = cache.read([HOOK], 0, TOKENS)
    assert array.dtype == dtype
    assert (array == BLOCK.astype(dtype)).all()


def test_the_files_are_plain_arrow_with_a_manifest(cache):
    table = pa.ipc.open_file(file_of(cache)).read_all()
    assert table.column("activations").to_pylist() == BLOCK.tolist()
    manifest = json.loads(cache.folder.read("manifest.json"))
    assert manifest == IDENTITY


@pytest.mark.parametrize("cut", [0, 40, 700])
def test_a_file_that_was_cut_off_is_noticed(cache, cut):
    data = file_of(cache).read_bytes()
    file_of(cache).write_bytes(data[: len(data) - cut - 1])
    assert cache.read([HOOK], 3, TOKENS) is None
    assert "harvested again" in cache.warnings[0]


def test_every_changed_byte_of_the_activations_is_noticed(cache):
    data = bytearray(file_of(cache).read_bytes())
    at = bytes(data).index(BLOCK.tobytes())
    for i in range(0, BLOCK.nbytes, 7):
        changed = data.copy()
        changed[at + i] ^= 1
        file_of(cache).write_bytes(changed)
        assert cache.read([HOOK], 3, TOKENS) is None
    assert "checksum" in cache.warnings[0]


def test_blocks_of_another_stream_are_not_taken(cache, tmp_path):
    assert cache.read([HOOK], 3, TOKENS + 1) is None  # other text
    assert "tokens differs" in cache.warnings[-1]
    other = ActivationCache(str(tmp_path), IDENTITY | {"weights": "other"})
    other.write(HOOK, 3, TOKENS, BLOCK)
    file_of(cache).write_bytes(file_of(other).read_bytes())  # copied over
    assert cache.read([HOOK], 3, TOKENS) is None
    assert "identity differs" in cache.warnings[-1]
    again = ActivationCache(str(tmp_path), IDENTITY)
    assert again.warnings == []


def test_a_damaged_or_foreign_manifest_is_written_anew(cache, tmp_path):
    for text, words in (("{", "damaged"), (json.dumps(IDENTITY | {"weights": "x"}), "another")):
        cache.folder.write("manifest.json", text.encode())
        again = ActivationCache(str(tmp_path), IDENTITY)
        assert words in again.warnings[0]
        assert json.loads(again.folder.read("manifest.json")) == IDENTITY


def test_hook_points_of_earlier_sweeps_stay_in_the_manifest(cache, tmp_path):
    ActivationCache(str(tmp_path), IDENTITY | {"block_shapes": {"blocks.1.hook_resid_pre": [6, 4]}})
    manifest = json.loads(cache.folder.read("manifest.json"))
    assert set(manifest["block_shapes"]) == {HOOK, "blocks.1.hook_resid_pre"}


EARLIER = IDENTITY | {"weights": "part of w"}


@pytest.fixture
def of_before(tmp_path):
    """Block 3 as a version up to 0.1 has left it."""
    cache = ActivationCache(str(tmp_path), EARLIER)
    cache.write(HOOK, 3, TOKENS, BLOCK)
    return cache


def test_blocks_of_a_version_before_are_read_with_a_warning(tmp_path, of_before):
    cache = ActivationCache(str(tmp_path), IDENTITY, EARLIER)
    (array,) = cache.read([HOOK], 3, TOKENS)
    assert (array == BLOCK).all()
    (warning,) = cache.warnings
    assert of_before.folder.uri in warning
    assert "delete it if the model has changed" in warning
    assert cache.read([HOOK], 4, TOKENS) is None
    assert cache.folder.names() == []  # nothing is made for reading
    cache.write(HOOK, 4, TOKENS, BLOCK)
    assert json.loads(cache.folder.read("manifest.json")) == IDENTITY
    assert of_before.read([HOOK], 4, TOKENS) is None  # new ones are the new identity's
    again = ActivationCache(str(tmp_path), IDENTITY, EARLIER)
    assert again.read([HOOK], 4, TOKENS) is not None


def test_no_block_of_another_model_is_taken_for_one_of_before(tmp_path, of_before):
    other = EARLIER | {"weights": "part of another"}
    cache = ActivationCache(str(tmp_path), IDENTITY, other)
    assert cache.read([HOOK], 3, TOKENS) is None
    assert cache.warnings == []


def test_how_blocks_are_mixed_and_who_reads_them_is_no_part_of_the_identity():
    def identity(**changes):
        return identities_of(resolve(config(**changes)), ("full", "part"), "cpu", {HOOK: 4})

    for changes in (dict(n_batches_in_buffer=8), dict(lr=1e-2), dict(training_tokens=5 * 10**6)):
        assert identity(**changes) == identity()
    assert identity(context_size=64) != identity()


def test_fields_that_came_later_count_where_they_are_given(tiny):
    resolved = resolve(LanguageModelSAERunnerConfig(**tiny))

    def identity(**changes):
        return identities_of(resolved.replace(**changes), ("w", "old"), "cpu", {"hook": 4})[0]

    assert not {"dataset_revision", "txt_documents"} & set(identity())
    assert identity(dataset_revision="main") != identity() != identity(txt_documents="file")
