"""Makes what the HTML report is made with: `python docs/report_assets.py` fetches its JavaScript libraries anew.

`vendored.json` pins package, version and checksum of each; what does not match its checksum is not written. It needs
npm. `python docs/report_assets.py picture` makes the picture of docs/report.md; it needs playwright and Chromium.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ASSETS = HERE.parent / "otel_odibi" / "report" / "assets"
CHROMIUM = "/usr/bin/chromium"


def libraries() -> None:
    """Write each vendored file from the npm package that it is pinned to."""
    for name, pin in json.loads((ASSETS / "vendored.json").read_text(encoding="utf-8")).items():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                ["npm", "pack", "--silent", f"{pin['package']}@{pin['version']}"],
                cwd=folder,
                check=True,
                stdout=subprocess.DEVNULL,
            )
            with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
                member = archive.extractfile(f"package/{pin['path']}")
                assert member is not None
                data = member.read()
        if hashlib.sha256(data).hexdigest() != pin["sha256"]:
            sys.exit(f"{name}: {pin['package']} {pin['version']} has another checksum than vendored.json says")
        (ASSETS / name).write_bytes(data)
        print(name, len(data))


def picture() -> None:
    """Run the demo a few times, and take a picture of the last run's report."""
    from playwright.sync_api import sync_playwright

    from otel_odibi import demo, process, store
    from otel_odibi.report.html import write

    with tempfile.TemporaryDirectory() as folder:
        with process.configure(service_name="flights", directory=folder):
            for _ in range(8):
                demo.run(Path(folder))
        write(store.open(folder), "last", Path(folder) / "run.html")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1480, "height": 920}, color_scheme="light")
            page.goto((Path(folder) / "run.html").as_uri())
            page.locator("html[data-ready]").wait_for()
            page.screenshot(path=HERE / "images" / "report-light.png")
            browser.close()


if __name__ == "__main__":
    picture() if sys.argv[1:] == ["picture"] else libraries()
