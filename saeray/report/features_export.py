"""An SAE's features as SAEDashboard writes them, and as Neuronpedia takes them in.

    saedashboard/batch-0.json …            what its NeuronpediaRunner leaves behind
    saedashboard/skipped_indexes.json      features that never fired
    neuronpedia/<model>/<source>/          the folder that Neuronpedia imports
      release.jsonl  model.jsonl  sourceset.jsonl  source.jsonl
      features/batch-0.jsonl.gz  activations/batch-0.jsonl.gz …

Where SAEDashboard samples tokens, ours are contexts (each counts once, by its peak), and its
intervals are our bands. As there, decoder rows have norm 1 (activations are multiplied by the norm,
logits divided), the BOS token that begins a window is left out, and neurons and
other features are correlated with nothing where that was not asked for.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from saeray.files import feature_data, strict_json
from saeray.files.feature_data import Context, FeatureData
from saeray.files.storage import Folder
from saeray.spec.transcoder import layer_of

PER_BATCH = 128  # features of one file, SAEDashboard's own default
ROUNDED = 3  # decimals of logits and histograms, as there
ACTIVATION_DECIMALS = 5
CREATOR = "saeray"
# Rows carry a time; the same features give the same bytes, so it is not that of the export.
CREATED = "1970-01-01T00:00:00"


def write(folder: Folder, kind: str) -> int:
    """Writes the export `kind` of an SAE whose features are in its folder; bytes written."""
    data = feature_data.read(folder)
    files = dict(saedashboard(data) if kind == "saedashboard" else neuronpedia(data))
    target = folder / kind
    target.delete()
    for name, content in files.items():
        *inner, last = name.split("/")
        place = target
        for part in inner:
            place = place / part
        place.write(last, content)
    return sum(map(len, files.values()))


def model_id(data: FeatureData) -> str:
    """The model's name without its owner or path, as a folder may have it."""
    name = PurePosixPath(data.about["model_name"].removeprefix("saeray:")).name
    return {"gpt2": "gpt2-small"}.get(name, name)


def layer(data: FeatureData) -> int:
    return layer_of(data.about["writes_to"]) or 0


def set_name(data: FeatureData) -> str:
    """Of the sweep and the SAE: letters, digits and dashes, so that it can be in an address."""
    plain = re.sub(r"[^a-zA-Z0-9.]+", "-", f"{data.about['sweep']}-{data.about['sae']}")
    return plain.strip("-").lower()


def source_id(data: FeatureData) -> str:
    return f"{layer(data)}-{set_name(data)}"


# --- SAEDashboard -------------------------------------------------------------------------------


def batches(data: FeatureData) -> Iterator[tuple[str, list[int]]]:
    """(name, features that fired) of each file."""
    fired = np.flatnonzero(data.fired)
    for i, first in enumerate(range(0, len(fired), PER_BATCH)):
        yield f"batch-{i}", fired[first : first + PER_BATCH].tolist()


def saedashboard(data: FeatureData) -> Iterator[tuple[str, bytes]]:
    head = {"model_id": model_id(data), "layer": layer(data), "sae_set": set_name(data)}
    for name, features in batches(data):
        batch = head | {"sae_id_suffix": None, "features": [dashboard(data, j) for j in features]}
        yield f"{name}.json", as_json(batch)
    skipped = np.flatnonzero(data.fired == 0).tolist()
    about = head | {"layer": str(head["layer"]), "log_sparsity": None, "skipped_indexes": skipped}
    yield "skipped_indexes.json", as_json(about)


def dashboard(data: FeatureData, feature: int) -> dict[str, Any]:
    """One feature, with the fields of SAEDashboard's NeuronpediaDashboardFeature."""
    a, norm = data.arrays, norm_of(data, feature)
    counts = a["histogram"][feature]
    used = int(np.flatnonzero(counts)[-1]) + 1
    middles = (np.arange(used) + 0.5) * float(a["bin_width"][feature]) * norm
    top, bottom = data.effects(feature, "top"), data.effects(feature, "bottom")
    logit_counts, logit_middles = np.zeros(0, np.int64), np.zeros(0)
    if data.has_logits:
        logit_counts = a["logit_histogram"][feature]
        low, high = a["logit_range"][feature].astype(np.float64)
        step = (high - low) / len(logit_counts)
        logit_middles = (low + (np.arange(len(logit_counts)) + 0.5) * step) / norm
    return {
        "feature_index": feature,
        **dict.fromkeys(NOT_COMPUTED, ()),
        "neg_str": [data.text(e.token) for e in bottom],
        "neg_values": rounded([e.logit / norm for e in bottom]),
        "pos_str": [data.text(e.token) for e in top],
        "pos_values": rounded([e.logit / norm for e in top]),
        "frac_nonzero": float(data.density[feature]),
        "freq_hist_data_bar_values": rounded(middles),
        "freq_hist_data_bar_heights": counts[:used].tolist(),
        "logits_hist_data_bar_heights": logit_counts.tolist(),
        "logits_hist_data_bar_values": rounded(logit_middles),
        "n_prompts_total": len(data.tokens),
        "n_tokens_in_prompt": int(data.tokens.shape[1]),
        "dataset": data.about["dataset_path"],
        "decoder_weights_dist": [],
        "activations": list(sequences(data, feature)),
        "vector": [],
    }


NOT_COMPUTED = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
    "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson",
)  # fmt: skip


def sequences(data: FeatureData, feature: int) -> Iterator[dict[str, Any]]:
    """The top, then the bands from the highest on."""
    norm = norm_of(data, feature)
    largest = round(float(data.arrays["largest"][feature]) * norm, ROUNDED)
    for c in data.top(feature):
        yield {"bin_min": -1, "bin_max": largest, "bin_contains": -1, **sequence(data, c, norm)}
    for band in data.bands(feature):
        about = {
            "bin_min": round(band.low * norm, ROUNDED),
            "bin_max": round(band.high * norm, ROUNDED),
            "bin_contains": round(band.tokens / data.n_tokens, 7),
        }
        for c in band.contexts:
            yield about | sequence(data, c, norm)


def norm_of(data: FeatureData, feature: int) -> float:
    """Of its decoder row. SAEDashboard makes rows of norm 1 and multiplies activations by it."""
    return float(data.arrays["decoder_norm"][feature]) or 1.0


def sequence(data: FeatureData, c: Context, norm: float) -> dict[str, Any]:
    tokens = data.tokens[c.window]
    # A BOS that is the peak itself stays: something has to be pointed at.
    first = 1 if data.about["prepend_bos"] and c.position > 0 else 0
    values = np.zeros(len(tokens), np.float32)
    values[c.positions] = c.values * np.float32(norm)
    return {
        "tokens": [data.text(int(t)) for t in tokens[first:]],
        "values": [round(float(v), ACTIVATION_DECIMALS) for v in values[first:]],
        "qualifying_token_index": c.position - first,
    }


# --- Neuronpedia --------------------------------------------------------------------------------


def neuronpedia(data: FeatureData) -> Iterator[tuple[str, bytes]]:
    model, source = model_id(data), source_id(data)
    root = f"{model}/{source}"
    for name, row in heads(data).items():
        yield f"{root}/{name}.jsonl", as_json(row) + b"\n"
    for name, features in batches(data):
        rows, contexts = [], []
        for j in features:
            shown = dashboard(data, j)
            found = list(shown.pop("activations"))
            contexts += [activation(data, j, i, of) for i, of in enumerate(found)]
            rows.append(feature_row(data, j, shown))
        yield f"{root}/features/{name}.jsonl.gz", zipped(rows)
        yield f"{root}/activations/{name}.jsonl.gz", zipped(contexts)


def heads(data: FeatureData) -> dict[str, dict[str, Any]]:
    """The rows that stand above features: release, model, source set, source."""
    about, model, name = data.about, model_id(data), set_name(data)
    common = {"creatorId": CREATOR, "createdAt": CREATED}
    said = f"{about['architecture']} SAE at {about['hook_point']} of {about['model_name']}"
    public = {"visibility": "PUBLIC", **common}
    return {
        "release": {
            "name": name, "description": said, "descriptionShort": said, "creatorName": CREATOR,
            "creatorNameShort": CREATOR, "urls": [], **public,
        },
        "model": {
            "id": model, "displayName": model, "displayNameShort": model, "instruct": False,
            "tlensId": about["model_name"], "layers": 0, "neuronsPerLayer": 0, "owner": "",
            "updatedAt": CREATED, **public,
        },
        "sourceset": {
            "modelId": model, "name": name, "description": said, "type": "",
            "creatorName": CREATOR, "releaseName": name, "urls": [], "hasDashboards": True,
            **public,
        },
        "source": {
            "id": source_id(data), "modelId": model, "setName": name, "hasDashboards": True,
            "num_prompts": len(data.tokens), "num_tokens_in_prompt": int(data.tokens.shape[1]),
            "dataset": about["dataset_path"], "notes": about["logits"], **public,
        },
    }  # fmt: skip


def feature_row(data: FeatureData, feature: int, shown: dict[str, Any]) -> dict[str, Any]:
    left_out = ("feature_index", "n_prompts_total", "n_tokens_in_prompt", "dataset")
    near = data.neighbours(feature)
    return {
        "modelId": model_id(data),
        "layer": source_id(data),
        "index": str(feature),
        "creatorId": CREATOR,
        "createdAt": CREATED,
        "maxActApprox": float(data.arrays["largest"][feature]) * norm_of(data, feature),
        "hasVector": False,
        "vectorLabel": None,
        "hookName": data.about["writes_to"],
        "topkCosSimIndices": [j for j, _ in near],
        "topkCosSimValues": [round(cosine, ACTIVATION_DECIMALS) for _, cosine in near],
        **{name: value for name, value in shown.items() if name not in left_out},
    }


def activation(data: FeatureData, feature: int, i: int, of: dict[str, Any]) -> dict[str, Any]:
    values = of["values"]
    largest = max(values)
    source = source_id(data)
    return {
        "id": identity(f"{data.about['digest']} {source} {feature} {i}"),
        "tokens": of["tokens"],
        "index": str(feature),
        "layer": source,
        "modelId": model_id(data),
        "maxValue": largest,
        "maxValueTokenIndex": values.index(largest),
        "minValue": min(values),
        "values": values,
        "creatorId": CREATOR,
        "createdAt": CREATED,
        "dfaValues": [],
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
        "lossValues": [],
        "logitContributions": None,
        "binMin": of["bin_min"],
        "binMax": of["bin_max"],
        "binContains": of["bin_contains"],
        "qualifyingTokenIndex": of["qualifying_token_index"],
        "dataIndex": None,
        "dataSource": None,
    }


def identity(text: str) -> str:
    """25 characters that begin with c, the shape of Neuronpedia's row ids; the same each time."""
    return "c" + hashlib.sha256(text.encode()).hexdigest()[:24]


def zipped(rows: list[dict[str, Any]]) -> bytes:
    lines = b"".join(as_json(row) + b"\n" for row in rows)
    return gzip.compress(lines, compresslevel=5, mtime=0)


def as_json(data: object) -> bytes:
    return strict_json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def rounded(values: Iterable[float]) -> list[float]:
    return [round(float(v), ROUNDED) for v in values]
