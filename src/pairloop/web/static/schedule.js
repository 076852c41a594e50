// The schedule's form: the clock as people say it becomes `every` and `cron`, what did not change is not sent, and the server is
// asked, with dryrun, when the next cycle would begin.
"use strict";

(() => {
  let asked = 0;
  const form = () => document.getElementById("schedule-form");
  const part = (name) => form().querySelector(`[data-part="${name}"]`).value.trim();

  function clock(kind) {
    const [hour, minute] = part("time").split(":").map(Number);
    const lines = {
      hourly: () => `${Number(part("minute"))} * * * *`,
      daily: () => `${minute} ${hour} * * *`,
      weekly: () => `${minute} ${hour} * * ${part("day")}`,
      cron: () => part("cron"),
      both: () => part("cron"),
    };
    return { every: kind === "every" || kind === "both" ? part("every") : null, cron: kind in lines ? lines[kind]() : null };
  }

  // The fields that are to be sent; the others are disabled.
  function changed() {
    const kind = form().querySelector("[data-cadence]").value;
    for (const label of form().querySelectorAll("[data-for]")) label.hidden = !label.dataset.for.split(" ").includes(kind);
    const pairs = part("min_pairs");
    const wanted = { ...clock(kind), min_pairs: pairs === "" ? null : Number(pairs) }, fields = {};
    for (const name of Object.keys(wanted)) {
      const field = form().elements[name];
      field.value = JSON.stringify(wanted[name]);
      field.disabled = field.value === field.dataset.now;
      if (!field.disabled) fields[name] = wanted[name];
    }
    return fields;
  }

  function tell(text, isWrong, canBeSet) {
    const line = form().querySelector("[data-preview]");
    line.textContent = text;
    line.classList.toggle("wrong", isWrong);
    form().querySelector("button.main").disabled = !canBeSet;
  }

  async function look() {
    const number = ++asked, fields = changed();
    if (!Object.keys(fields).length) return tell("As it is now.", false, false);
    const [method, path] = form().dataset.api.split(" ");
    try {
      const found = await callApi(method, path, { ...fields, dryrun: true });
      if (number === asked) tell(`Then: ${found.text[0].toLowerCase()}${found.text.slice(1)}`, false, true);
    } catch (error) {
      if (number === asked) tell(error.message, true, false);
    }
  }

  // Somebody else may set the schedule meanwhile: a form that nobody has touched is fetched anew, in another one it is said.
  let toldOf = "";
  function notice() {
    const now = document.getElementById("origins").dataset.origins;
    if (form().dataset.origins === now || document.querySelector("#edit dialog[open]")) return;
    if (!Object.keys(changed()).length && !form().elements.reason.value && !form().contains(document.activeElement)) {
      document.body.dispatchEvent(new CustomEvent("schedule:set"));
    } else if (toldOf !== now) {
      tell("The schedule was set meanwhile: the table below has what holds now. What you change here goes on top of it.", false, !form().querySelector("button.main").disabled);
    }
    toldOf = now;
  }

  let waiting;
  document.addEventListener("input", (event) => {
    if (!form() || !form().contains(event.target) || event.target.name === "reason") return;
    clearTimeout(waiting);
    asked += 1;
    waiting = setTimeout(look, 200);
  });
  document.addEventListener("htmx:afterSettle", (event) => {
    if (event.target.id === "now" && form()) notice();
  });
  document.addEventListener("api:done", (event) => {
    if (event.target.closest("#edit")) document.body.dispatchEvent(new CustomEvent("schedule:set"));
  });
})();
