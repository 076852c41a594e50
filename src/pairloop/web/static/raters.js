// Before a quarantine or release is confirmed, the API says what it would change.
"use strict";

const duelWords = ({ wins, losses, e_value: e }) => `${wins} wins, ${losses} losses, E ${e.toPrecision(3)}`;

function effectOf({ action, picks, pairs, duel_before: before, duel_after: after }) {
  const lines = [
    `${picks} rows of feedback are theirs.`,
    `${pairs} pairs of the next dataset ${action === "quarantine" ? "rest on them and go" : "come back"}.`,
  ];
  if (before === null) lines.push("No duel is open, so no gate changes.");
  else lines.push(`Open duel: ${duelWords(before)}`, `afterwards: ${duelWords(after)}`);
  return lines.join("\n");
}

async function preview(form) {
  const effect = document.getElementById("effect");
  effect.textContent = "Counting …";
  const [method, path] = form.dataset.api.split(" ");
  try {
    effect.textContent = effectOf(await callApi(method, path, { ...fieldsOf(form), reason: "preview", dryrun: true }));
  } catch (error) {
    effect.textContent = error.message;
  }
}

document.addEventListener("submit", (event) => { if ("preview" in event.target.dataset) preview(event.target); });
document.addEventListener("api:done", (event) => {
  const { object, data } = event.detail || {};
  if (object === "queue.gold.unanimous") event.target.dataset.done = `${data.length} became gold.`;
});
