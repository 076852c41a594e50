// A search that goes on by itself: <p data-search="/page/search?…" data-rows="id of a tbody"> hears of each window that was looked
// through (web/pages/searching.py), by itself with data-auto, else when its button is pressed; then the button stops it.
"use strict";

let search = null;

function stopSearch(why = "") {
  if (search === null) return;
  search.source.close();
  search.line.querySelector("button").hidden = true;
  search.line.querySelector("span").append(why);
  search = null;
}

function startSearch(line) {
  stopSearch();
  line.hidden = false;
  line.querySelector("button").textContent = "Stop";
  search = { line, source: new EventSource(line.dataset.search), shown: {} };
  search.source.addEventListener("found", ({ data }) => showFound(JSON.parse(data)));
  search.source.addEventListener("end", () => stopSearch());
  search.source.addEventListener("error", () => stopSearch(" It broke off here; load the page anew to search on."));
}

function showFound({ rows, parts }) {
  if (!search.line.isConnected) return stopSearch();
  const list = document.getElementById(search.line.dataset.rows);
  if (rows.trim()) {
    list.insertAdjacentHTML("beforeend", rows);
    for (let around = list; around !== null; around = around.parentElement) around.hidden = false;
    htmx.process(list);
  }
  for (const [id, html] of Object.entries(parts)) {
    if (search.shown[id] === html) continue;  // what did not change keeps its focus
    search.shown[id] = html;
    document.getElementById(id).innerHTML = html;
  }
  document.dispatchEvent(new CustomEvent("search:found"));
}

function attendSearch(part) {
  const line = part.querySelector("[data-search]");
  if (line === null) return;
  if ("auto" in line.dataset) startSearch(line);
  else line.hidden = false;
}

document.addEventListener("click", (event) => {
  const line = event.target.closest("[data-search] button")?.closest("[data-search]");
  if (!line) return;
  if (search?.line === line) stopSearch(" Stopped.");
  else startSearch(line);
});
document.addEventListener("htmx:afterSwap", (event) => attendSearch(event.target));
window.addEventListener("pagehide", () => stopSearch());
attendSearch(document);
