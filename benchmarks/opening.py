"""How long report.html of a sweep of 100 SAEs takes to open in Chromium, and how large it is.

    python benchmarks/opening.py                 # needs chromium, chromedriver and the dev extra
    python benchmarks/opening.py --lr 10 --l1 50 # 500 SAEs

The sweep is made up (as the tests' are), of as many lr times as many L1 coefficients. From the
request for the file to the moment at which all of the page is drawn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from peers import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from support.browser import Browser, chromium
from support.pictured import pictured

from saeray.report.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lr", type=int, default=5)
    parser.add_argument("--l1", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        folder = pictured(
            Path(where) / "sweep",
            lr=[1e-4 * 1.2**i for i in range(arguments.lr)],
            l1_coefficient=[1e-4 * 1.2**i for i in range(arguments.l1)],
        )
        write_report([folder], folder)
        page = Path(folder.path) / "report.html"
        browser = Browser(chromium())
        try:
            seconds = []
            for _ in range(arguments.rounds + 1):
                began = time.perf_counter()
                browser.open(page)
                seconds.append(time.perf_counter() - began)
            drawn = len(browser.all("#table tbody tr"))
        finally:
            browser.driver.quit()
        size, again = page.stat().st_size / 1e6, statistics.median(seconds[1:])
        print(
            f"{drawn} SAEs, {size:.1f} MB: the first time {seconds[0]:.2f} s,"
            f" then {again:.2f} s (median of {arguments.rounds})"
        )


if __name__ == "__main__":
    main()
