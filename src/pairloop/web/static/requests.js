// A request's page: the answer of another version beside the recorded one, its words compared by words.js.
"use strict";

document.addEventListener("api:done", (event) => {
  const form = event.target.closest("[data-replay]");
  if (form === null) return;
  const reply = event.detail;
  const against = form.querySelector("[data-against]");
  const original = document.querySelector(`[data-answer="${against ? against.value : 0}"] .text`).textContent;
  const result = document.querySelector("[data-result]");
  const parts = wordDiff(original, reply.text) || [["del", original], ["ins", reply.text]];
  show(result.querySelector("[data-before]"), parts, "del");
  show(result.querySelector("[data-after]"), parts, "ins");
  result.querySelector("[data-who]").textContent = `${reply.model} says now`;
  const mean = reply.logp_mean === null ? "" : `, log-prob a token ${reply.logp_mean.toFixed(3)}`;
  const same = reply.text === original ? "the same words, " : "";
  result.querySelector("[data-figures]").textContent = `${same}${reply.tokens} tokens, ended by ${reply.finish_reason}${mean}`;
  result.hidden = false;
});
