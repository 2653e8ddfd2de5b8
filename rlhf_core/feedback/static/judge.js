// Judging by keys and by touch, and the box in which a judgement waits while there is no connection. Dragging: drag.js.

const page = document.getElementById("judge");
const { kind, annotator } = page.dataset;
const notice = document.getElementById("notice");
const comment = document.getElementById("comment");
const written = document.getElementById("written");
const guideline = document.getElementById("guideline");
const cards = kind === "write" ? [] : [...document.querySelectorAll(".response")];
const scales = [...document.querySelectorAll(".scores fieldset")]; // one for each response and axis
const draft = `rlhf-feedback-draft-${annotator}-${page.dataset.item}`; // what this person is writing, until it is sent
const box = `rlhf-feedback-${annotator}`;
const RETRY = 3000; // milliseconds
const SETTLE = 350; // milliseconds in which a page takes no answer: the second half of a double click is none
const began = performance.now();
const REFUSED = [404, 409, 413, 422]; // sending these again would change nothing, if it is the pages that say so
let token = document.querySelector("meta[name=csrf]").content;
let unkept = null; // what waits while the browser stores nothing
let busy = false;

// ---- sending

function waiting() {
  if (unkept) return unkept;
  try {
    return JSON.parse(localStorage.getItem(box)) ?? [];
  } catch {
    return [];
  }
}

function keep(entries) {
  unkept = null;
  try {
    if (entries.length) localStorage.setItem(box, JSON.stringify(entries));
    else localStorage.removeItem(box); // which a full store allows too
  } catch {
    unkept = entries; // a full or forbidden store: they wait as long as this page is open
  }
}

function tell(text, link) {
  notice.textContent = text;
  notice.hidden = !text;
  if (link) {
    const anchor = document.createElement("a");
    anchor.href = link;
    anchor.textContent = "Log in";
    notice.append(" ", anchor);
  }
}

async function post(path, body) {
  const headers = { "Content-Type": "application/json", "X-CSRF-Token": token, Accept: "application/json" };
  try {
    const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body) });
    if (!answer.headers.has("X-Feedback-Pages")) return { status: 0 }; // a proxy's word, or another server's
    const told = await answer.json().catch(() => ({}));
    return { status: answer.status, detail: typeof told.detail === "string" ? told.detail : "It was not accepted." };
  } catch {
    return { status: 0 };
  }
}

// A session that ended and began again has another token. Never send one person's judgement as another's.
async function freshToken() {
  try {
    const answer = await fetch("/token", { headers: { Accept: "application/json" } });
    const told = await answer.json();
    if (!answer.ok || String(told.annotator) !== annotator) return false;
    const changed = told.csrf !== token;
    token = told.csrf;
    return changed;
  } catch {
    return false;
  }
}

async function flush() {
  busy = true;
  let refusal = "";
  while (waiting().length) {
    const [entry] = waiting();
    const { status, detail } = await post("/judgements", entry);
    if (status === 200 || REFUSED.includes(status)) {
      if (status !== 200) refusal = detail;
      keep(waiting().filter((other) => other.client_id !== entry.client_id));
    } else {
      if (status === 403 && (await freshToken())) continue;
      const many = waiting().length;
      const what = `${many === 1 ? "A judgement waits" : `${many} judgements wait`} on this ${unkept ? "page" : "device"}`;
      const open = unkept ? " This browser stores nothing now: leave the page open." : "";
      if (status >= 500) tell(`${detail} ${what}.${open}`);
      else if (status === 401 || status === 403) tell(`You are not logged in. ${what} and will be sent when you judge again.${open}`, "/login");
      else tell(`No connection. ${what} and will be sent once, as soon as it is back.${open}`);
      setTimeout(flush, RETRY);
      return;
    }
  }
  if (refusal) {
    busy = false;
    tell(`The last judgement was not stored: ${refusal} Load the page again to go on.`);
  } else {
    location.reload();
  }
}

function send(verdict, ranks, more = {}) {
  if (busy || performance.now() - began < SETTLE) return;
  const bytes = crypto.getRandomValues(new Uint8Array(16)); // randomUUID is there over HTTPS only
  const client_id = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  const seconds = Math.min(86400, Math.round(timeSeen() / 100) / 10);
  const entry = { client_id, item: page.dataset.item, verdict, ranks, comment: comment.value, seconds, ...more };
  keep([...waiting(), entry]);
  forget();
  flush();
}

async function undo() {
  if (!page.dataset.last || performance.now() - began < SETTLE) return;
  busy = true;
  const { status, detail } = await post(`/judgements/${page.dataset.last}/undo`, {});
  if (status === 200) return location.reload();
  busy = false;
  tell(status ? detail : "No connection: undo waits for it. Try again.");
}

// ---- what is being written: a page that is closed or loaded again keeps it

function forget() {
  try {
    localStorage.removeItem(draft);
  } catch {
    // Nothing was kept.
  }
}

if (written) {
  try {
    written.value = localStorage.getItem(draft) ?? written.value;
  } catch {
    // The text of the page stays.
  }
  written.addEventListener("input", () => {
    try {
      localStorage.setItem(draft, written.value);
    } catch {
      // It is kept as long as this page is open.
    }
  });
  written.focus();
  written.setSelectionRange(written.value.length, written.value.length);
}

function submitWritten() {
  if (!written.value.trim()) return tell("Write something, or skip.");
  send("written", null, { written: written.value });
}

// ---- time: only while the page is seen

let seen = 0;
let since = document.hidden ? null : performance.now();
document.addEventListener("visibilitychange", () => {
  if (since !== null) seen += performance.now() - since;
  since = document.hidden ? null : performance.now();
});
const timeSeen = () => seen + (since === null ? 0 : performance.now() - since);

// ---- ranking: groups of places, best first; a group is a tie

let groups = [];
let tie = false;

function place(index) {
  if (groups.some((group) => group.includes(index))) {
    groups = groups.map((group) => group.filter((other) => other !== index)).filter((group) => group.length);
    tie = false;
  } else if (tie && groups.length) {
    groups.at(-1).push(index);
    tie = false;
  } else {
    groups.push([index]);
  }
}

function takeBack() {
  if (tie) tie = false;
  else if (groups.length && groups.at(-1).length > 1) groups.at(-1).pop();
  else groups.pop();
}

const placed = () => groups.flat().length;
const ordinal = (number) => `${number}${["st", "nd", "rd"][number - 1] || "th"}`;

function draw() {
  if (kind !== "rank" || !cards.length) return;
  cards.forEach((card, index) => {
    const rank = groups.findIndex((group) => group.includes(index)) + 1;
    card.classList.toggle("placed", rank > 0);
    card.querySelector(".rank").textContent = rank ? ordinal(rank) : "";
    card.querySelector("button").setAttribute("aria-label", `Response ${index + 1}${rank ? `, ${ordinal(rank)}` : ""}`);
  });
  const left = cards.length - placed();
  const loose = cards.map((_, index) => index).filter((index) => !groups.flat().includes(index));
  const parts = groups.map((group) => part("group", group));
  document.getElementById("line").replaceChildren(
    ...parts.flatMap((group, index) => (index ? [" › ", group] : [group])),
    tie ? " = … " : left && parts.length ? " › … " : "",
    ...(left ? [part("loose", loose)] : []),
  );
  const said = groups.map((group) => group.map((index) => index + 1).join(" and ") + (group.length > 1 ? " tied" : ""));
  document.getElementById("said").textContent = said.join(", then ") + (left && said.length ? `; ${left} more to place` : "");
  document.querySelector("[data-key=enter]").disabled = left > 0;
  document.querySelector("[data-key='=']").setAttribute("aria-pressed", String(tie));
}

// Numbers that can be dragged, a tie with = between them.
function part(name, indexes) {
  const element = document.createElement("span");
  element.className = name;
  indexes.forEach((index, position) => {
    const chip = document.createElement("span");
    chip.className = "chip";
    chip.dataset.drag = index;
    chip.textContent = index + 1;
    element.append(...(position && name === "group" ? [" = ", chip] : [chip]));
  });
  return element;
}

function submitRanks() {
  const left = cards.length - placed();
  if (left) return tell(`${left} more to place.`);
  const empty = scales.filter((scale) => !scoreOf(scale));
  if (empty.length) {
    tell(`${empty.length} more to score: press 1 to ${inputsOf(empty[0]).length}.`);
    return inputsOf(empty[0])[0].focus();
  }
  const scores = {};
  scales.forEach((scale) => (scores[scale.dataset.axis] ??= []).push(Number(scoreOf(scale))));
  const ranks = cards.map((_, index) => groups.findIndex((group) => group.includes(index)) + 1);
  send("ranked", ranks, scales.length ? { scores } : {});
}

// ---- scores by axis: a digit scores and goes on, Backspace goes back, Esc leaves

const inputsOf = (scale) => [...scale.querySelectorAll("input")];
const scoreOf = (scale) => scale.querySelector("input:checked")?.value;

function score(key, scale) {
  const position = scales.indexOf(scale);
  const chosen = inputsOf(scale).find((input) => input.value === key);
  if (chosen) chosen.checked = true;
  const next = chosen ? scales[position + 1] : key === "backspace" ? scales[Math.max(0, position - 1)] : null;
  if (next) (next.querySelector("input:checked") || inputsOf(next)[0]).focus();
  else if (chosen || key === "escape") document.activeElement.blur();
  if (chosen) tell("");
  return Boolean(chosen || next || key === "escape");
}

// ---- keys and buttons

function act(key) {
  if (busy) return;
  if (key === "u") return undo();
  if (!page.dataset.item) return;
  if (key === "g" || key === "?") return guideline.showModal();
  if (key === "c") return comment.focus();
  if (key === "s") return send("skipped", null);
  if (key === "n" || (kind === "compare" && key === "-")) return send("none", null);
  if (kind === "write") return key === "enter" ? submitWritten() : undefined;
  const digit = /^[0-9]$/.test(key) ? Number(key) : null;
  if (kind === "compare") {
    if (digit === 1 || key === "arrowleft") return send("ranked", [1, 2]);
    if (digit === 2 || key === "arrowright") return send("ranked", [2, 1]);
    if (digit === 0) return send("ranked", [1, 1]);
    return;
  }
  if (digit && digit <= cards.length) place(digit - 1);
  else if (key === "=") tie = !tie && groups.length > 0 && placed() < cards.length;
  else if (key === "backspace") takeBack();
  else if (key === "enter") return submitRanks();
  else return;
  tell("");
  draw();
}

const KNOWN = /^([0-9]|=|-|\?|[ucgsn]|backspace|enter|arrowleft|arrowright)$/;

document.addEventListener("keydown", (event) => {
  const key = event.key.toLowerCase();
  if (event.target === comment || event.target === written) {
    if (key === "escape") event.target.blur();
    if (key === "enter" && (event.ctrlKey || event.metaKey) && kind !== "compare") act("enter");
    return;
  }
  if (guideline.open || event.repeat || event.ctrlKey || event.metaKey || event.altKey || !KNOWN.test(key)) return;
  // Enter on a button that has the focus presses that button, as everywhere.
  if (key === "enter" && event.target.closest("a, button")) return;
  event.preventDefault();
  act(key);
});

document.addEventListener("keydown", (event) => {
  const scale = event.target.closest?.(".scores fieldset");
  if (scale && !event.ctrlKey && !event.metaKey && !event.altKey && score(event.key.toLowerCase(), scale)) {
    event.preventDefault();
    event.stopImmediatePropagation();
  }
}, true);

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-key]");
  if (!button) return;
  if (event.detail) button.blur(); // after a click with the mouse Enter shall submit, not press it again
  act(button.dataset.key);
});

const earlier = page.dataset.ranks.split(" ").filter(Boolean).map(Number); // of a judgement that was undone
if (kind === "rank" && earlier.length) {
  const ranks = [...new Set(earlier)].sort((a, b) => a - b);
  groups = ranks.map((rank) => earlier.flatMap((other, index) => (other === rank ? [index] : [])));
}
draw();
if (kind === "rank" && cards.length) {
  // drag.js tells where a number was dropped: on a group (a tie), before or behind one.
  document.addEventListener("dropped", ({ detail: { index, onto, place: where } }) => {
    if (busy || onto?.includes(index)) return;
    const rest = groups.map((group) => group.filter((other) => other !== index));
    const at = onto ? groups.findIndex((group) => group.some((other) => onto.includes(other) && other !== index)) : -1;
    if (at < 0) rest.push([index]);
    else if (where === "tie") rest[at].push(index);
    else rest.splice(at + (where === "behind"), 0, [index]);
    groups = rest.filter((group) => group.length);
    tie = false;
    tell("");
    draw();
  });
}
if (waiting().length) flush();
