// The loop moves: the server says so, and what is marked with hx-trigger="loop:tick from:body" (or loop:moved) looks again.
"use strict";

const LISTEN_AGAIN_MS = 30000;
let source = null;
let listenAgain = 0;

const announce = (name) => document.body.dispatchEvent(new CustomEvent(`loop:${name}`));

function listen() {
  if (source !== null) return;
  source = new EventSource("/page/events");
  for (const name of ["tick", "moved"]) source.addEventListener(name, () => announce(name));
  // A stream that breaks off is opened again by the browser. One that was refused is not: then the page looks by itself, slowly.
  source.addEventListener("error", () => {
    if (source === null || source.readyState !== EventSource.CLOSED) return;
    hangUp();
    listenAgain = setTimeout(() => { announce("moved"); listen(); }, LISTEN_AGAIN_MS);
  });
}

function hangUp() {
  clearTimeout(listenAgain);
  if (source !== null) source.close();
  source = null;
}

// A hidden page asks for nothing; seen again, it hears of the present state at once.
function attend() {
  if (document.hidden) hangUp();
  else listen();
}

document.addEventListener("visibilitychange", attend);
window.addEventListener("pagehide", hangUp);
window.addEventListener("pageshow", attend);

// What somebody opened stays open when its part of the page is fetched anew.
const opened = new WeakMap();
const placeOf = (details) => {
  const holder = details.closest("[id]") ?? document.body;
  return `${holder.id} ${[...holder.querySelectorAll("details")].indexOf(details)}`;
};
document.body.addEventListener("htmx:beforeSwap", ({ detail: { target } }) => {
  opened.set(target, [...target.querySelectorAll("details[open]")].map(placeOf));
});
document.body.addEventListener("htmx:afterSwap", ({ detail: { target } }) => {
  for (const details of target.querySelectorAll("details")) details.open ||= (opened.get(target) ?? []).includes(placeOf(details));
});
