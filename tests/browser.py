"""A page in headless Chromium: what a script finds in it, what axe-core objects to, what it logs, and its print."""

import html
import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: chromium)")
# Errors of the page's own scripts, and then what the test's script returns.
FRAME = """<script>window.failed = []; addEventListener("error", (event) => failed.push(event.message));</script>"""
ASK = """<script>addEventListener("load", async () => {{ const found = await (async () => {{ {script} }})();
const place = parent.document.createElement("pre"); place.id = "found";
place.textContent = JSON.stringify({{found, failed}}); parent.document.body.append(place); }});</script>"""
# A window of Chromium is at least 500 pixels wide; a frame in it can be as narrow as a phone.
WINDOW = """<!DOCTYPE html><html><body style="margin: 0">
<iframe style="border: 0; width: {width}px; height: 2000px" srcdoc="{page}"></iframe></body></html>"""

# A frame whose scripts may not run, as with JavaScript turned off, and the window's own script, which reads the frame.
SANDBOX = """<!DOCTYPE html><html><body><iframe sandbox="allow-same-origin" srcdoc="{page}"></iframe><script>
addEventListener("load", () => {{ const shown = frames[0].document, place = document.createElement("pre");
place.id = "found"; place.textContent = JSON.stringify({{html: shown.documentElement.outerHTML,
picker: getComputedStyle(shown.querySelector(".picker")).display}}); document.body.replaceChildren(place); }});
</script></body></html>"""


def chromium(*flags: object, expected: str | None = None) -> str:
    """What Chromium prints. It must log nothing to the console, or else messages that contain `expected` alone."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert all(expected and expected in line for line in errors) and (errors or not expected), errors
    return done.stdout


def ask(page: Path, script: str, width: int = 1280, dark: bool = False, library: str = "") -> object:
    """What `script`, the body of an async function, returns in a copy of the page to which the scripts of `library` are
    added; errors of the page's own scripts fail."""
    text = page.read_text("utf-8")
    asking = text.replace("<head>", f"<head>{FRAME}", 1).replace(
        "</body>", library + ASK.format(script=script) + "</body>"
    )
    window = page.with_name("asked.html")
    window.write_text(WINDOW.format(width=width, page=html.escape(asking)), "utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    dom = chromium(scheme, "--window-size=1400,2000", "--virtual-time-budget=60000", "--dump-dom", window.as_uri())
    window.unlink()
    answer = found_in(dom)
    assert not answer["failed"], answer["failed"]
    return answer["found"]


def found_in(dom: str) -> dict:
    """What a test's script has left in a dump of the window."""
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    return json.loads(html.unescape(found[1]))


def violations(page: Path, width: int, dark: bool) -> list[str]:
    """What axe-core objects to, with all its rules, contrast among them. The insides of drawings are taken out
    before: their thousands of lines take axe-core long, a screen reader says their label alone, and LAYOUT reads their
    texts."""
    code = resources.files("axe_core_python").joinpath("axe.min.js").read_text("utf-8")
    library = "<script>" + code.replace("</script", "<\\/script") + "</script>"
    return ask(page, AXE, width, dark, library)


def without_scripts(page: Path) -> dict:
    """The page's elements, as `html`, and how its `picker` is displayed, where its JavaScript may not run."""
    window = page.with_name("asked.html")
    window.write_text(SANDBOX.format(page=html.escape(page.read_text("utf-8"))), "utf-8")
    dom = chromium("--dump-dom", window.as_uri(), expected="Blocked script execution")
    window.unlink()
    return found_in(dom)


AXE = """
document.querySelectorAll("svg").forEach((drawing) => drawing.replaceChildren());
const found = await axe.run();
return found.violations.map((one) => one.id + ": " + one.nodes.map((node) => node.html.slice(0, 120)).join(" | "));
"""
# Whether the page is wider than the window, the texts of one drawing that lie on each other or beyond its edge, and of
# all texts in drawings the smallest size in pixels and the least contrast, by WCAG's formula, to the page.
LAYOUT = """
const overlaps = [], sizes = [], contrasts = [];
const luminance = (css) => css.match(/[\\d.]+/g).slice(0, 3).map((value) => value / 255)
  .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
  .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
const ground = getComputedStyle(document.body).backgroundColor;
for (const text of document.querySelectorAll("svg text")) {
  const style = getComputedStyle(text), box = text.getBoundingClientRect(), svg = text.closest("svg");
  const edge = svg.getBoundingClientRect();
  const [low, high] = [luminance(style.fill), luminance(ground)].sort((a, b) => a - b);
  sizes.push(parseFloat(style.fontSize) * svg.getScreenCTM().a);
  contrasts.push((high + 0.05) / (low + 0.05));
  if (box.left < edge.left - 1 || box.right > edge.right + 1) overlaps.push("cut off: " + text.textContent);
}
for (const svg of document.querySelectorAll("svg")) {
  const boxes = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
  boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
    const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (wide > 1 && high > 2) overlaps.push(svg.getAttribute("aria-label").slice(0, 50) + ": " + a + " | " + b);
  }));
}
return {overlaps, width: innerWidth, needed: document.documentElement.scrollWidth, ground,
  smallest: Math.min(...sizes), contrast: Math.min(...contrasts)};
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
