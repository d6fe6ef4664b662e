"""Every code block and command in README and docs is run, page by page, and what it prints is compared."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "collector-config/README.md",
    ROOT / "grafana/README.md",
]
NEEDS = re.compile(r"<!-- needs (?P<module>\w+): (?P<remedy>[^>]+) -->\n")  # for pages on what has pins of its own
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]+) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    mark: str
    kind: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(match["mark"] or "", match["kind"], match["text"]) for match in found]


def shape(text: str) -> str:
    """Return what stays the same from run to run: ids, numbers, bars and runs of blanks made alike."""
    text = re.sub(r"\b[0-9a-f]{16,32}\b", "ID", text)
    text = re.sub(r"\d+(?:[.,:]\d+)*", "N", text)
    text = re.sub(r"[─━▏▎▍▌▋▊▉█▐╸╺╹ ]+", " ", text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "ODIBI_", "PYTEST_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PATH": path, "PYTHONIOENCODING": "utf-8", "COLUMNS": "100"}


def run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Session:
    """One Python process for the blocks of a page, as a reader would type them into one session."""

    END = "=== end of block ==="
    LOOP = f"""
import json, sys
scope = {{"__name__": "__main__"}}
for line in sys.stdin:
    exec(compile(json.loads(line), "<page>", "exec"), scope)
    print({END!r}, flush=True)
"""

    def __init__(self, cwd: Path) -> None:
        command = [sys.executable, "-c", self.LOOP]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=cwd, env=environment(), stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )

    def run(self, code: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        printed = []
        for line in self.process.stdout:
            if line.rstrip("\n") == self.END:
                return "".join(printed)
            printed.append(line)
        raise AssertionError(f"{code}\n{self.process.communicate()[1]}")

    def close(self) -> None:
        _, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, errors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_the_page_says_is_what_happens(page: Path, tmp_path: Path) -> None:
    """Python blocks of a page run one after the other in one session; commands run in a shell beside it."""
    needs = NEEDS.match(page.read_text(encoding="utf-8"))
    if needs and importlib.util.find_spec(needs["module"]) is None:
        pytest.skip(f"{page.name} needs {needs['module']}: {needs['remedy']}")
    session = Session(tmp_path)
    printed = ""
    for block in blocks_of(page):
        if block.mark.startswith("file: "):
            (tmp_path / block.mark.removeprefix("file: ")).write_text(block.text, encoding="utf-8")
        elif block.kind == "python":
            printed = session.run(block.text)
        elif block.kind == "bash":
            printed = run(["bash", "-euo", "pipefail", "-c", block.text], tmp_path)
        elif block.mark == "prints":
            assert shape(printed) == shape(block.text)
    session.close()


def test_generated_pages_are_in_step_with_the_code() -> None:
    """The settings page and the metrics table are what `python docs/generate.py` writes today."""
    code = "import runpy; p = runpy.run_path('docs/generate.py')['pages'](); " + (
        "[print(path) for path, text in p.items() if path.read_text(encoding='utf-8') != text]"
    )
    assert run([sys.executable, "-c", code], ROOT) == ""


def test_links_between_pages_lead_somewhere() -> None:
    """Every relative link and picture in README and docs names a file that is there."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
