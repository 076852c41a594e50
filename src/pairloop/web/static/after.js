// After the pick: reasons, a comment, the answer as it should be. `round` is what chat.js has on the screen.
"use strict";

async function say(mine, metric, value, choice, tags = {}) {
  const body = { inference_id: mine.id, metric_name: metric, value, source_id: visitor, tags: { via: "page", ...tags } };
  if (choice !== undefined && choice !== null) body.choice_index = choice;
  return (await post("/v1/feedback", body)).json();
}

function openAfter() {
  byId("after").hidden = false;
  byId("why").reset();
  for (const chip of document.querySelectorAll("[data-reason]")) chip.setAttribute("aria-pressed", "false");
  byId("edit").open = false;
  byId("edit-title").textContent = canEdit(round) ? "Edit the answer" : "Write the answer that you wanted";
  round.why = "";
}

const served = (mine) => mine.texts[mine.kind === "single" ? 0 : mine.taken] ?? "";

// In a very long text a browser's editor stands still.
const canEdit = (mine) => served(mine) !== "" && served(mine).length <= SHOWN_LIMIT;

async function saveWhy(mine) {
  const reasons = [...document.querySelectorAll("[data-reason][aria-pressed=true]")].map((chip) => chip.dataset.reason).join(", ");
  const comment = byId("comment").value.trim();
  const why = `${reasons}\n${comment}`;
  if (!mine || byId("after").hidden || why === "\n" || why === mine.why) return false;
  mine.why = why;
  await say(mine, "comment", comment || reasons, mine.kind === "single" ? 0 : null, reasons ? { reasons } : {});
  return true;
}

async function saveIdeal() {
  const mine = round;
  const text = byId("ideal-text").value;
  if (text === served(mine)) {
    note("Nothing is changed yet.");
    return;
  }
  try {
    const { feedback_id: id } = await say(mine, "demonstration", text, mine.taken);
    mine.edited = text;
    if (round === mine) {
      byId("edit").open = false;
      note("Your answer is kept as an example, and the conversation goes on with it.");
      prompt.focus();
    }
    rememberPick(id, "your answer", mine.question);
  } catch (error) {
    note(`Your answer was not saved: ${error.message}`, true);
  }
}

for (const chip of document.querySelectorAll("[data-reason]")) {
  chip.addEventListener("click", () => chip.setAttribute("aria-pressed", chip.getAttribute("aria-pressed") === "false"));
}
byId("why").addEventListener("submit", async (event) => {
  event.preventDefault();
  await saveWhy(round).then((saved) => note(saved ? "Noted, thank you." : "Choose a reason or write something first."), (error) => {
    round.why = "";
    note(`It was not saved: ${error.message}`, true);
  });
});
byId("edit").addEventListener("toggle", () => {
  if (!byId("edit").open || !round) return;
  byId("ideal-text").value = round.edited ?? (canEdit(round) ? served(round) : "");
  byId("ideal-text").focus();
});
byId("ideal").addEventListener("submit", (event) => {
  event.preventDefault();
  saveIdeal();
});
