// Keys and accounts: dialogs that make, change and end them; a new key is shown in a dialog of its own, and only there.
"use strict";

const dialogOf = (id) => document.getElementById(id);
const changed = () => document.body.dispatchEvent(new CustomEvent("keys:changed"));

function show(id) {
  const dialog = dialogOf(id);
  dialog.querySelector("form").reset();
  dialog.showModal();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button === null) return;
  const { open, act, change, role, sure, verb, done } = button.dataset;
  if (open) show(open);
  if ("close" in button.dataset) button.closest("dialog").close();
  if (act) {
    dialogOf("sure-text").textContent = sure;
    dialogOf("sure-verb").textContent = verb;
    Object.assign(dialogOf("sure").querySelector("form").dataset, { api: act, done });
    show("sure");
  }
  if (change) {
    const form = dialogOf("change-account").querySelector("form");
    form.dataset.api = `POST /v1/accounts/${encodeURIComponent(change)}`;
    dialogOf("changed").textContent = change;
    show("change-account");
    form.elements.role.value = role;
  }
});

document.addEventListener("api:done", (event) => {
  event.target.closest("dialog").close();
  event.target.reset();
  if (event.target.dataset.made === "key") {
    dialogOf("secret").textContent = event.detail.token;
    dialogOf("copy").textContent = "Copy";
    dialogOf("made-key").showModal();
  } else changed();
});

// The list is not looked at again before the key was taken: a server that had none asks for it from now on.
dialogOf("made-key").addEventListener("close", () => {
  dialogOf("secret").textContent = "";
  changed();
});

dialogOf("copy").addEventListener("click", async () => {
  const secret = dialogOf("secret");
  try {
    await navigator.clipboard.writeText(secret.textContent);
    dialogOf("copy").textContent = "Copied";
  } catch {  // no clipboard without https: select it, for the keyboard to copy
    window.getSelection().selectAllChildren(secret);
    dialogOf("copy").textContent = "Selected: press Ctrl+C";
  }
});
