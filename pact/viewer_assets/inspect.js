"use strict";
// Weights follow the slider by the formulas of pact/schedules.py. Every run of tokens has one weight, or, where reasoning
// is annealed token by token, its first tokens have it and the others, class "out", have none.
const config = JSON.parse(document.getElementById("data").textContent);
const slider = document.getElementById("progress");
const shown = document.getElementById("progress-value");
const here = document.getElementById("here");

function supervisedSegments(n, s) {
  return Math.max(0, Math.ceil((1 - s) * n - 1e-9));
}

function linear(start, end, s) {
  return (1 - s) * start + s * end;
}

function weight(run, s) {
  const { component, segment, segments, before, block } = run.dataset;
  if (component === "reasoning") {
    if (config.reasoning_anneal === "none") return 1;
    if (config.reasoning_anneal === "off") return 0;
    if (config.reasoning_anneal === "token") return Number(before) < supervisedSegments(Number(block), s) ? 1 : 0;
    if (config.reasoning_anneal === "linear") return linear(1, 0, s);
    return Number(segment) < supervisedSegments(Number(segments), s) ? 1 : 0;
  }
  if (component === "tool_call") return linear(config.tool_call_weight[0], config.tool_call_weight[1], s);
  return component === "answer" ? config.answer_weight : 0;
}

// How many of the run's tokens have its weight.
function kept(run, s) {
  const tokens = Number(run.dataset.tokens);
  if (config.reasoning_anneal !== "token" || run.dataset.component !== "reasoning") return tokens;
  const left = supervisedSegments(Number(run.dataset.block), s) - Number(run.dataset.before);
  return left > 0 ? Math.min(left, tokens) : tokens; // a run behind the prefix has weight 0 as a whole
}

// Tells the tokens without weight from those before them; the fold of a long run counts as the token it begins with.
function mark(run, n) {
  const tokens = Number(run.dataset.tokens);
  if (n === tokens && !run.querySelector(".out")) return;
  Array.from(run.querySelector(".text").children).forEach((part, at) => part.classList.toggle("out", at >= n));
}

function apply(s) {
  shown.textContent = s.toFixed(3);
  for (const trace of document.querySelectorAll(".seq.trace")) {
    let total = 0;
    let supervised = 0;
    for (const run of trace.querySelectorAll(".run")) {
      const w = weight(run, s);
      const n = kept(run, s);
      const tokens = Number(run.dataset.tokens);
      mark(run, n);
      run.dataset.w = String(w);
      run.style.setProperty("--w", String(Math.min(1, w)));
      const label = run.querySelector(".note i");
      if (label) label.textContent = n < tokens ? `${n} of ${tokens}` : w.toFixed(2);
      total += w * n;
      if (w > 0) supervised += n;
    }
    const sum = document.getElementById(trace.dataset.sum);
    sum.textContent = `${supervised} tokens have weight, ${total.toFixed(2)} in all`;
  }
}

function fromAddress() {
  const match = /^#progress=(0(?:\.\d+)?|1(?:\.0+)?)$/.exec(location.hash);
  if (match) slider.value = match[1];
  apply(match ? Number(match[1]) : config.progress); // the slider rounds
}

if (slider) {
  slider.addEventListener("input", () => apply(Number(slider.value)));
  slider.addEventListener("change", () => history.replaceState(null, "", `#progress=${slider.value}`));
  window.addEventListener("hashchange", fromAddress);
  fromAddress();
}

// What is known of a token: under the pointer, or walked to with the arrow keys.
let now = null;

function tell(token) {
  if (now) now.classList.remove("now");
  now = token;
  if (!token) return;
  token.classList.add("now");
  const run = token.closest(".run");
  const place = Number(run.dataset.start) + Array.prototype.indexOf.call(run.querySelectorAll(".t"), token);
  const parts = [`token ${place}`, `id ${token.dataset.id}`, run.dataset.component.replace("_", " ")];
  if (Number(run.dataset.segments)) parts.push(`segment ${Number(run.dataset.segment) + 1} of ${run.dataset.segments}`);
  if (run.dataset.w !== undefined) parts.push(`weight ${token.matches(".out") ? 0 : run.dataset.w}`);
  here.textContent = `${parts.join(" · ")} · ${JSON.stringify(token.textContent)}`;
}

for (const sequence of document.querySelectorAll(".seq")) {
  sequence.addEventListener("pointerover", (event) => {
    const token = event.target.closest(".t");
    if (token) tell(token);
  });
  sequence.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const tokens = Array.from(sequence.querySelectorAll(".t"));
    const at = tokens.indexOf(now);
    let next = at < 0 ? 0 : Math.min(tokens.length - 1, Math.max(0, at + step));
    if (at >= 0 && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
      const run = tokens[at].closest(".run");
      while (tokens[next].closest(".run") === run && tokens[next + step]) next += step;
    }
    tell(tokens[next]);
    tokens[next].scrollIntoView({ block: "nearest" });
  });
}
