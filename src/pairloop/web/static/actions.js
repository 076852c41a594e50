// Forms that change something: <form data-api="POST /v1/…" data-done="Promoted."> sends its fields as JSON to the API, the same
// one that everybody uses. Fields: data-type="number|boolean|date|json" where it is no text (a date: as Unix seconds); an empty one without data-keep is
// left out; checkboxes with data-list of one name are a list of the checked values.
// data-confirm="dialog-id" shows that <dialog> first, whose own form (method="dialog") may add fields, a reason say.
// data-goto="/page" leads on; otherwise the page hears loop:moved and looks again.
// <button data-copy="id"> puts that element's text on the clipboard.
// Who logs out leaves nothing in this browser.
"use strict";

function toast(text, isError = false) {
  const line = document.createElement("p");
  line.className = isError ? "toast error" : "toast";
  line.textContent = text;
  const toasts = document.getElementById("toasts");
  toasts.replaceChildren(line);
  if (toasts.matches(":popover-open")) toasts.hidePopover();
  toasts.showPopover();  // above a dialog that is open
  setTimeout(() => line.remove(), isError ? 15000 : 6000);
}

function fieldsOf(form) {
  const fields = {};
  for (const field of form.elements) {
    if (!field.name || field.disabled || (field.type === "radio" && !field.checked)) continue;
    if (field.type === "checkbox" && "list" in field.dataset) {
      fields[field.name] ??= [];
      if (field.checked) fields[field.name].push(field.value);
    } else if (field.type === "checkbox") fields[field.name] = field.checked;
    else if (field.value === "" && !("keep" in field.dataset)) continue;
    else if (field.dataset.type === "number") fields[field.name] = Number(field.value);
    else if (field.dataset.type === "boolean") fields[field.name] = field.value === "true";
    else if (field.dataset.type === "date") fields[field.name] = Date.parse(field.value) / 1000;
    else if (field.dataset.type === "json") fields[field.name] = JSON.parse(field.value);
    else fields[field.name] = field.value;
  }
  return fields;
}

// What the API says, or an Error with its own words.
async function callApi(method, path, fields) {
  const request = { method, headers: { "content-type": "application/json" } };
  if (method !== "GET" && method !== "DELETE") request.body = JSON.stringify(fields);
  const response = await fetch(path, request);
  const reply = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(reply.error ? reply.error.message : `the server answered ${response.status}`);
  return reply;
}

// Resolves to the dialog's fields, or to null where it was left.
function confirmed(dialog) {
  return new Promise((resolve) => {
    dialog.returnValue = "";
    dialog.showModal();
    dialog.addEventListener(
      "close",
      () => resolve(dialog.returnValue === "yes" ? fieldsOf(dialog.querySelector("form")) : null),
      { once: true },
    );
  });
}

async function send(form) {
  const [method, path] = form.dataset.api.split(" ");
  let fields = fieldsOf(form);
  if (form.dataset.confirm) {
    const more = await confirmed(document.getElementById(form.dataset.confirm));
    if (more === null) return;
    fields = { ...fields, ...more };
  }
  form.setAttribute("aria-busy", "true");
  try {
    const reply = await callApi(method, path, fields);
    form.dispatchEvent(new CustomEvent("api:done", { bubbles: true, detail: reply }));
    if (form.dataset.goto) window.location.assign(form.dataset.goto);
    toast(form.dataset.done || "Done.");
    document.body.dispatchEvent(new CustomEvent("loop:moved"));
  } catch (error) {
    toast(error.message, true);
  } finally {
    form.removeAttribute("aria-busy");
  }
}

document.addEventListener("submit", (event) => {
  if (!event.target.dataset.api) return;
  event.preventDefault();
  send(event.target);
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  try {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
    toast("Copied.");
  } catch {
    toast("The browser lets nothing be copied here: mark the text and copy it by hand.", true);
  }
});

// After every page's own pagehide, which may keep something once more.
document.addEventListener("submit", (event) => {
  if (event.target.getAttribute("action") !== "/logout") return;
  window.addEventListener("pagehide", () => {
    try {
      for (const kept of [localStorage, sessionStorage]) {
        for (const name of Object.keys(kept)) if (name.startsWith("pairloop.")) kept.removeItem(name);
      }
    } catch { /* forbidden: then nothing is kept */ }
  });
});
