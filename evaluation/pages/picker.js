"use strict";
// Draws the neuron plan that the reader chooses. Without scripts the page shows the default plan, as plain SVG.
(function () {
  const plans = JSON.parse(document.getElementById("plans").textContent);
  const side = document.getElementById("pick-side");
  const layer = document.getElementById("pick-layer");
  const place = document.getElementById("picked");
  const table = document.getElementById("picked-matches");
  const said = document.getElementById("picked-said");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const bytes = (text) => Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
  // Support points of matplotlib's map cividis, from little to much.
  const MAP = [[0, 34, 78], [53, 69, 108], [102, 105, 112], [148, 142, 119], [200, 184, 102], [254, 232, 56]];

  function shade(share) {
    const at = Math.min(share, 0.9999) * (MAP.length - 1), low = Math.floor(at), rest = at - low;
    return MAP[low].map((value, i) => Math.round(value + rest * (MAP[low + 1][i] - value)));
  }

  function panel(title, kind, width, height) {
    const box = document.createElement("div"), head = document.createElement("p");
    const canvas = document.createElement("canvas");
    box.className = "drawn " + kind;
    head.textContent = title;
    canvas.width = width;
    canvas.height = height;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", title);
    box.append(head, canvas);
    place.append(box);
    return canvas.getContext("2d");
  }

  function drawBlocks(plan, title) {
    const context = panel(title, "blocks", plan.width, plan.height), values = bytes(plan.blocks);
    const image = context.createImageData(plan.width, plan.height);
    values.forEach((value, i) => image.data.set([...shade(value / 254), 255], 4 * i));
    context.putImageData(image, 0, 0);
  }

  function drawPoints(text, title) {
    const width = 460, height = 400, context = panel(title, "points", width, height), values = bytes(text);
    const half = values.length / 2;
    let most = 1;
    values.forEach((value) => { most = Math.max(most, Math.abs(value - 127)); });
    context.fillStyle = colour("blue");
    context.globalAlpha = 0.6;
    for (let i = 0; i < half; i++) {
      const x = (values[i] - 127) / most, y = (values[half + i] - 127) / most;
      context.beginPath();
      context.arc(width * (0.5 + 0.46 * x), height * (0.5 - 0.46 * y), 4.5, 0, 2 * Math.PI);
      context.fill();
    }
  }

  function fillLayers() {
    const before = layer.value;
    layer.replaceChildren(...plans[side.value].map((plan) => new Option(String(plan.layer))));
    if ([...layer.options].some((one) => one.value === before)) layer.value = before;
  }

  function show() {
    const plan = plans[side.value].find((one) => String(one.layer) === layer.value);
    place.replaceChildren();
    said.textContent = `${side.value}, target layer ${plan.layer}, source layer ${plan.source}`;
    drawBlocks(plan, "target neurons (down) by source neurons, reordered");
    plan.points.forEach((points, i) => {
      const [target, source, r] = plan.matches[i];
      drawPoints(points, `target ${target} (across) and source ${source}, r = ${r.toFixed(2)}`);
    });
    table.replaceChildren(...plan.matches.map((match) => {
      const row = document.createElement("tr");
      match.forEach((value, i) => {
        const cell = document.createElement("td");
        cell.textContent = i < 2 ? value : i === 2 ? value.toFixed(3) : value.toFixed(1) + " %";
        row.append(cell);
      });
      return row;
    }));
  }

  side.replaceChildren(...Object.keys(plans).map((name) => new Option(name)));
  side.value = side.dataset.first;
  fillLayers();
  layer.value = layer.dataset.first;
  side.addEventListener("change", () => { fillLayers(); show(); });
  layer.addEventListener("change", show);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (place.querySelector("canvas")) show(); });
  document.documentElement.classList.add("scripted");
})();
