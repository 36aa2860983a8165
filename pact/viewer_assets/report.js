"use strict";
// Values under the pointer, or at the step that the arrow keys choose; the drawing itself is there without this.
const panels = JSON.parse(document.getElementById("data").textContent);

function format(value) {
  return String(Number(value.toPrecision(4)));
}

function nearest(steps, step) {
  let best = 0;
  for (let i = 1; i < steps.length; i += 1) {
    if (Math.abs(steps[i] - step) < Math.abs(steps[best] - step)) best = i;
  }
  return best;
}

for (const plot of document.querySelectorAll(".plot")) {
  const panel = panels[Number(plot.dataset.panel)];
  const cursor = plot.querySelector(".cursor");
  const values = plot.closest("figure").querySelector(".values");
  const shown = values.querySelectorAll("[data-v]");
  const label = values.querySelector("[data-step]");
  const steps = [...new Set(panel.curves.flatMap((curve) => curve[0]))].sort((a, b) => a - b);
  let at = steps.length - 1;

  const show = (place) => {
    at = Math.min(steps.length - 1, Math.max(0, place));
    const x = panel.left + ((steps[at] - panel.low) / (panel.high - panel.low)) * (panel.right - panel.left);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
    label.textContent = `step ${format(steps[at])}`;
    panel.curves.forEach(([xs, ys], i) => {
      shown[i].textContent = format(ys[nearest(xs, steps[at])]);
    });
  };
  const rest = () => {
    cursor.style.visibility = "hidden";
    label.textContent = "last";
    panel.curves.forEach(([, ys], i) => {
      shown[i].textContent = format(ys[ys.length - 1]);
    });
  };

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * plot.viewBox.baseVal.width;
    const step = panel.low + ((x - panel.left) / (panel.right - panel.left)) * (panel.high - panel.low);
    show(nearest(steps, step));
  });
  plot.addEventListener("pointerleave", rest);
  plot.addEventListener("blur", rest);
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -steps.length, End: steps.length }[event.key];
    if (!step) return;
    event.preventDefault();
    show(at + step);
  });
}
