// The ticked groups go into the decisions' forms; without any, the filters do, and without filters nothing is decided.
// A pair opens as a drawer.
"use strict";

function ticked() {
  return [...document.querySelectorAll("[data-tick]:checked")].map((box) => box.dataset.tick);
}

function choose() {
  const ids = ticked();
  const chosen = document.getElementById("chosen");
  if (chosen === null) return;
  const some = ids.length > 0, mayDecide = some || "filtered" in chosen.dataset;
  const all = chosen.dataset.all === "1" ? "the one group that the filters find" : `all ${chosen.dataset.all} groups that the filters find`;
  const scope = some ? `${ids.length} ticked ${ids.length === 1 ? "group" : "groups"}` : all;
  chosen.textContent = mayDecide ? `Decisions are about ${scope}.` : "Tick groups to decide about them, or set a filter to decide about all that it finds.";
  for (const form of document.querySelectorAll("#found form.decision")) {
    form.elements.ids.value = JSON.stringify(ids);
    form.elements.ids.disabled = !some;
    form.elements.filters.disabled = some;
    form.querySelector("button").disabled = !mayDecide;
  }
  for (const words of document.querySelectorAll("#found [data-scope]")) words.textContent = scope;
}

document.addEventListener("change", (event) => {
  if ("tickAll" in event.target.dataset) {
    for (const box of document.querySelectorAll("[data-tick]")) box.checked = event.target.checked;
  } else if (!("tick" in event.target.dataset)) return;
  choose();
});

// An address says what is asked, and not what is not.
document.addEventListener("submit", (event) => {
  if (event.target.method !== "get") return;
  for (const field of event.target.elements) if (field.value === "" && field.name) field.disabled = true;
});
window.addEventListener("pageshow", () => {
  for (const field of document.querySelectorAll("form[method=get] :disabled")) field.disabled = false;
});

document.addEventListener("api:done", (event) => {
  const { changed, selected } = event.detail;
  if (selected !== undefined) event.target.dataset.done = `${changed} of ${selected} ${selected === 1 ? "group" : "groups"} changed.`;
  if (event.target.dataset.api.includes("/v1/views")) window.location.reload();
  else document.body.dispatchEvent(new CustomEvent("preferences:changed"));
});

document.addEventListener("htmx:afterSwap", (event) => {
  const drawer = document.getElementById("drawer");
  if (event.target.id === "drawer-body" && !drawer.open) drawer.showModal();
  if (event.target.id === "found") choose();
});
document.addEventListener("search:found", choose);
document.addEventListener("DOMContentLoaded", choose);
if (document.readyState !== "loading") choose();
