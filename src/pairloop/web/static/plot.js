// Plots: what a point says under the pointer or the focus, and the downloads, of the picture as PNG and of its table as CSV.
"use strict";

const tip = document.createElement("p");
tip.className = "plot-tip";
tip.hidden = true;
document.body.append(tip);

function tell(point) {
  const box = point.getBoundingClientRect();
  tip.textContent = point.dataset.tip;
  tip.hidden = false;
  const left = Math.min(box.left + box.width / 2, window.innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left) + window.scrollX}px`;
  tip.style.top = `${box.top + window.scrollY - tip.offsetHeight - 8}px`;
}

for (const [come, go] of [["pointerover", "pointerout"], ["focusin", "focusout"]]) {
  document.addEventListener(come, (event) => {
    const point = event.target.closest(".plot .point");
    if (point) tell(point);
  });
  document.addEventListener(go, () => { tip.hidden = true; });
}

function save(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// A cell as CSV; one that a spreadsheet would run as a formula is kept a text.
function cellOf(text) {
  const safe = /^[=+@\t\r]/.test(text) || (/^-/.test(text) && Number.isNaN(Number(text))) ? `'${text}` : text;
  return `"${safe.replaceAll('"', '""')}"`;
}

function csvOf(figure) {
  const rows = [...figure.querySelectorAll("table tr")];
  const lines = rows.map((row) => [...row.cells].map((cell) => cellOf(cell.textContent.trim())).join(","));
  return new Blob([lines.join("\r\n"), "\r\n"], { type: "text/csv" });
}

const DRAWN = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-family", "font-size", "font-weight"];

// The picture as it looks now: the style sheet does not go along, so each part takes its computed style with it.
async function pngOf(figure) {
  const svg = figure.querySelector("svg");
  const copy = svg.cloneNode(true);
  const parts = copy.querySelectorAll("*");
  svg.querySelectorAll("*").forEach((part, place) => {
    const style = getComputedStyle(part);
    for (const name of DRAWN) parts[place].setAttribute(name, style.getPropertyValue(name));
  });
  const { width, height } = svg.viewBox.baseVal;
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  const image = new Image();
  image.src = `data:image/svg+xml,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [2 * width, 2 * height];
  const pen = canvas.getContext("2d");
  pen.fillStyle = getComputedStyle(document.body).getPropertyValue("--card");
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => { canvas.toBlob(resolve); });
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-download]");
  if (!button) return;
  const figure = button.closest(".plot");
  const kind = button.dataset.download;
  save(`${figure.dataset.plot}.${kind}`, kind === "csv" ? csvOf(figure) : await pngOf(figure));
});
