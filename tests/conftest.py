"""Fixtures: the bundled model and text, one Ray instance for all tests that ask for one, S3."""

import os
import threading

import pytest
import ray._private.auto_init_hook as auto_init
from support.bundled import grid, tiny_fields

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ADDRESS"] = "local"  # not whatever else runs on this machine
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("WANDB_SILENT", "true")
# A call that would start a Ray, as many do where there is none, is a fault of its test: those that
# come after it would find one.
auto_init.enable_auto_connect = False
# For the S3 server of `s3`; Ray's processes inherit them.
os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret"}


def pytest_collection_modifyitems(items):
    """Files that use the shared Ray come last, one after the other: the rest must find none."""
    using = {item.module for item in items if "ray_instance" in item.fixturenames}
    items.sort(key=lambda item: item.module in using)


@pytest.fixture
def tiny():
    """`tiny_fields`; a copy for each test."""
    return tiny_fields()


@pytest.fixture(scope="session")
def ray_instance():
    """Ray on this machine, shared. What a test leaves behind there, the next one would see."""
    from saeray.client.connect import end_ray, start_ray

    # A sweep of a test takes less than the 10 s between two reports of an actor's metrics.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        assert start_ray(None)
    import ray

    yield ray
    end_ray()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """What a sweep of `support.running.config()` gives when nothing happens to it."""
    from support.running import left_alone

    return left_alone(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def s3():
    """A server that speaks S3 on loopback; a function from a name to the URI of a new bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()

    def bucket(name):
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket=name)
        return f"s3://{name}?endpoint_override={host}:{port}&scheme=http&region=us-east-1"

    yield bucket
    server.stop()


@pytest.fixture(scope="session")
def http_files():
    """A server of files on loopback; a function from a folder to the URL it has there."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    servers = []

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    def url(folder):
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield url
    for server in servers:
        server.shutdown()


@pytest.fixture(scope="session")
def alone(ray_instance, s3):
    """What a sweep of `tiny_fields()` gives, one SAE. Its blocks are kept in a cache on S3.

    Its results are on S3 as well, with checkpoints all the time.
    """
    import saeray

    cached = dict(activation_cache=s3("cache"), resources=dict(harvesters=2))
    fields = tiny_fields() | cached | dict(checkpoint_every_s=0.1)
    return saeray.sweep(fields, name="alone", storage_path=s3("results"), live=False)


@pytest.fixture(scope="session")
def six(ray_instance, tmp_path_factory):
    """A sweep of `grid()`: the result and its folder, in which nobody writes."""
    import saeray

    folder = tmp_path_factory.mktemp("sweeps")
    result = saeray.sweep(grid(), name="six", storage_path=folder, live=False)
    return result, folder / "six"


@pytest.fixture(scope="module")
def browser():
    """A browser without a window; skips where there is none, and says so."""
    from support.browser import Browser, chromium

    driver = chromium()
    yield Browser(driver)
    driver.quit()
