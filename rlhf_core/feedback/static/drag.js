// Drags a number, by mouse, pen or finger, onto the line of the ranking; judge.js does what the drop says.

const line = document.getElementById("line");
const FAR = 8; // pixels before a press is a drag
const NEAR = 28; // pixels around the line where a drop still counts
let held = null; // what is pressed: its index, where, and the number that follows the pointer

const indexesOf = (group) => [...group.querySelectorAll("[data-drag]")].map((chip) => Number(chip.dataset.drag));

// The nearest group that is not only what is dragged, and on which part of it; null away from the line.
function target(x, y) {
  const area = line.getBoundingClientRect();
  if (y < area.top - NEAR || y > area.bottom + NEAR) return null;
  let nearest = null;
  for (const group of line.querySelectorAll(".group")) {
    if (indexesOf(group).every((index) => index === held.index)) continue;
    const box = group.getBoundingClientRect();
    const distance = Math.hypot(x - (box.left + box.width / 2), y - (box.top + box.height / 2));
    if (nearest && nearest.distance <= distance) continue;
    const edge = box.width / 4;
    const place = x < box.left + edge ? "before" : x > box.right - edge ? "behind" : "tie";
    nearest = { group, distance, place };
  }
  return nearest || { group: null, place: "behind" };
}

function mark(found) {
  for (const group of line.querySelectorAll(".group")) group.dataset.drop = found?.group === group ? found.place : "";
  line.classList.toggle("open", Boolean(found));
}

function letGo() {
  held?.ghost?.remove();
  if (held?.ghost) mark(null);
  held = null;
}

document.addEventListener("pointerdown", (event) => {
  const handle = event.target.closest("[data-drag]");
  if (line && handle && event.button === 0) held = { index: Number(handle.dataset.drag), x: event.clientX, y: event.clientY };
});

document.addEventListener("pointermove", (event) => {
  if (!held || (!held.ghost && Math.hypot(event.clientX - held.x, event.clientY - held.y) < FAR)) return;
  if (!held.ghost) {
    held.ghost = document.createElement("span");
    held.ghost.className = "chip ghost";
    held.ghost.textContent = held.index + 1;
    document.body.append(held.ghost);
  }
  held.ghost.style.transform = `translate(${event.clientX}px, ${event.clientY}px) translate(-50%, -120%)`;
  mark(target(event.clientX, event.clientY));
});

document.addEventListener("pointerup", (event) => {
  if (held?.ghost) {
    const found = target(event.clientX, event.clientY);
    const detail = found && { index: held.index, onto: found.group && indexesOf(found.group), place: found.place };
    if (detail) document.dispatchEvent(new CustomEvent("dropped", { detail }));
    // The click that follows a drag is not a press of the number.
    const swallow = (click) => click.stopImmediatePropagation();
    document.addEventListener("click", swallow, { capture: true, once: true });
    setTimeout(() => document.removeEventListener("click", swallow, true), 0);
  }
  letGo();
});

document.addEventListener("pointercancel", letGo);
document.addEventListener("dragstart", (event) => event.target.closest?.("[data-drag]") && event.preventDefault());
