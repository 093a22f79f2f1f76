"""Features by hand: what a pass would write, small enough to check by eye."""

import numpy as np

from saeray.files.feature_data import FULL, FeatureData

TEXTS = ["<bos>", " the", " cat", "\n", "<script>", "alert(1)", "</script>", "<!--", " ümlaut", "&"]
CONTEXT, L, TOP, BANDS, PER_BAND = 6, 70, 2, 2, 1
PLACES = TOP + BANDS * PER_BAND
DEAD, DENSE = 3, 5


def by_hand(**about):
    """70 features: the fourth never fired, the sixth is dense, the others fire alike.

    Feature j fires twice in its window: at its second token by 1 + j / 100, at its fourth by half.
    """
    tokens = np.array([[0, 1, 4, 5, 6, 2], [0, 7, 3, 8, 9, 2], [0, 2, 2, 2, 2, 1]], np.int32)
    window = np.full((L, PLACES), -1, np.int32)
    position = np.full((L, PLACES), -1, np.int16)
    peak = np.zeros((L, PLACES), np.float32)
    window[:, 0], position[:, 0] = np.arange(L) % 2, 2
    window[:, TOP], position[:, TOP] = 2, 1
    peak[:, 0] = 1 + np.arange(L) / 100
    peak[:, TOP] = 0.5
    window[DEAD], position[DEAD], peak[DEAD] = -1, -1, 0
    counts = np.zeros(L * PLACES, np.int64)
    counts[0::PLACES], counts[TOP::PLACES] = 2, 1
    counts[DEAD * PLACES : (DEAD + 1) * PLACES] = 0
    alive = L - 1
    histogram = np.zeros((L, 64), np.int32)
    histogram[:, 10], histogram[:, 40] = 2, 1
    histogram[DEAD], histogram[DENSE, 10] = 0, 9
    edges = np.tile(np.array([0, 0.75, 1.5], np.float32), (L, 1))
    arrays = {
        "histogram": histogram,
        "bin_width": np.full(L, 2 / 64, np.float32),
        "largest": peak[:, 0].copy(),
        "band_edges": edges,
        "band_tokens": np.tile(np.array([1, 2], np.int32), (L, 1)),
        "neighbour": np.tile(np.array([1, 2, -1], np.int32), (L, 1)),
        "cosine": np.tile(np.array([0.5, 0.25, 0], np.float32), (L, 1)),
        "decoder_norm": np.ones(L, np.float32),
        "window": window,
        "position": position,
        "peak": peak,
        "offsets": np.concatenate([[0], np.cumsum(counts)]),
        "active_position": np.tile(np.array([2, 4, 1], np.int16), alive),
        "active_share": np.tile(np.array([FULL, FULL // 2, FULL], np.int16), alive),
        "top_token": np.tile(np.array([4, 2], np.int32), (L, 1)),
        "top_logit": np.tile(np.array([2.0, 1.0], np.float32), (L, 1)),
        "bottom_token": np.tile(np.array([9, 1], np.int32), (L, 1)),
        "bottom_logit": np.tile(np.array([-2.0, -1.0], np.float32), (L, 1)),
        "logit_histogram": np.tile(np.arange(50, dtype=np.int32), (L, 1)),
        "logit_range": np.tile(np.array([-2.0, 2.0], np.float32), (L, 1)),
    }
    said = {
        "digest": "d", "sweep": "my sweep", "sae": "lr=0.001,l1_coefficient=<b>1</b>",
        "architecture": "standard", "model_name": "gpt2", "d_sae": L, "n_dead": 1, "n_dense": 1,
        "hook_point": "blocks.2.hook_resid_pre", "writes_to": "blocks.2.hook_resid_pre",
        "dataset_path": "text", "context_size": CONTEXT, "prepend_bos": True, "top": TOP,
        "bands": BANDS, "per_band": PER_BAND, "held_out_windows": 1, "windows": 3,
        "n_tokens": tokens.size, "logits": "folded",
        "texts": {str(i): text for i, text in enumerate(TEXTS)},
    }  # fmt: skip
    return FeatureData(said | about, arrays, tokens)
