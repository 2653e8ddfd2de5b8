// Looks every five seconds whether people said something new, while the page is seen.

const live = document.getElementById("live");
const notice = document.getElementById("notice-live");
const usual = notice.textContent;
const EVERY = 5000; // milliseconds
let shown = "";

// What somebody unfolded stays so.
function replace(text) {
  const open = [...live.querySelectorAll("details[open]")].map((details) => details.id);
  live.replaceChildren(...new DOMParser().parseFromString(text, "text/html").body.childNodes);
  live.querySelectorAll("details").forEach((details) => (details.open = open.includes(details.id)));
}

async function look() {
  if (document.hidden) return;
  try {
    const answer = await fetch("/results/live", { headers: { Accept: "text/html" }, redirect: "error" });
    if (!answer.ok) throw new Error();
    const text = await answer.text();
    if (text !== shown) replace(text);
    shown = text;
    notice.textContent = usual;
  } catch {
    notice.textContent = "No connection: these are the last results that arrived.";
  }
}

look();
setInterval(look, EVERY);
document.addEventListener("visibilitychange", look);
