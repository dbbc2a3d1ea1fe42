"""A page in headless Chromium: what a script finds in it, what it logs, and its print."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: chromium)")
# Errors of the page's own scripts, and then what the test's script returns.
FRAME = """<script>window.failed = []; addEventListener("error", (event) => failed.push(event.message));</script>"""
ASK = """<script>addEventListener("load", () => {{ const found = (() => {{ {script} }})();
const place = parent.document.createElement("pre"); place.id = "found";
place.textContent = JSON.stringify({{found, failed}}); parent.document.body.append(place); }});</script>"""
# A window of Chromium is at least 500 pixels wide; a frame in it can be as narrow as a phone.
WINDOW = """<!DOCTYPE html><html><body style="margin: 0">
<iframe style="border: 0; width: {width}px; height: 2000px" srcdoc="{page}"></iframe></body></html>"""


def chromium(*flags: object) -> str:
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not errors, errors
    return done.stdout


def ask(page: Path, script: str, width: int = 1280, dark: bool = False) -> object:
    """What `script`, the body of a function, returns in a copy of the page; errors of the page's own scripts fail."""
    text = page.read_text("utf-8")
    asking = text.replace("<head>", f"<head>{FRAME}", 1).replace("</body>", ASK.format(script=script) + "</body>")
    window = page.with_name("asked.html")
    window.write_text(WINDOW.format(width=width, page=html.escape(asking)), "utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    dom = chromium(scheme, "--window-size=1400,2000", "--virtual-time-budget=5000", "--dump-dom", window.as_uri())
    window.unlink()
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    answer = json.loads(html.unescape(found[1]))
    assert not answer["failed"], answer["failed"]
    return answer["found"]


# Whether the page is wider than the window, and the texts of one drawing that lie on each other.
LAYOUT = """
const overlaps = [];
for (const svg of document.querySelectorAll("svg")) {
  const boxes = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
  boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
    const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (wide > 1 && high > 2) overlaps.push(svg.getAttribute("aria-label").slice(0, 50) + ": " + a + " | " + b);
  }));
}
return {overlaps, width: innerWidth, needed: document.documentElement.scrollWidth,
  ground: getComputedStyle(document.body).backgroundColor};
"""
# The side and the layer that come last are picked.
PICK = """
const side = document.getElementById("pick-side"), layer = document.getElementById("pick-layer");
side.selectedIndex = side.options.length - 1;
side.dispatchEvent(new Event("change"));
layer.selectedIndex = layer.options.length - 1;
layer.dispatchEvent(new Event("change"));
return {said: document.getElementById("picked-said").textContent, side: side.value, layer: layer.value,
  canvases: document.querySelectorAll("#picked canvas").length,
  rows: [...document.querySelectorAll("#picked-matches tr")].map((row) => [...row.cells].map((td) => td.textContent))};
"""
