"""What Ray's metrics endpoints say while something runs, as Prometheus would read it."""

import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from typing import NamedTuple

import ray
from prometheus_client.parser import text_string_to_metric_families


class Sample(NamedTuple):
    kind: str  # of its family: gauge, counter
    name: str
    tags: dict[str, str]
    value: float


def scrape():
    """The samples of ours, of all nodes."""
    found = []
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                text = answer.read().decode()
        except urllib.error.URLError:  # it is just starting, or busy
            continue
        for family in text_string_to_metric_families(text):
            if family.name.startswith("ray_saeray_"):
                found += [
                    Sample(family.type, s.name, dict(s.labels), s.value) for s in family.samples
                ]
    return found


@contextmanager
def scraping():
    """With a list that is added to, every half second and once at the end."""
    seen, over = [], threading.Event()

    def look():
        while not over.wait(0.5):
            seen.extend(scrape())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join(timeout=30)
