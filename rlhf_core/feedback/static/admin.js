// Sends the chosen file as it is, with how to read it in the address; and marks known answers.

const form = document.getElementById("import");
const notice = document.getElementById("notice");
const headers = { "X-CSRF-Token": document.querySelector("meta[name=csrf]").content, Accept: "application/json" };

function tell(text) {
  notice.textContent = text;
  notice.hidden = false;
  notice.scrollIntoView({ block: "nearest" });
}

async function post(path, body) {
  const answer = await fetch(path, { method: "POST", headers, body });
  const told = await answer.json();
  if (!answer.ok) throw new Error(typeof told.detail === "string" ? told.detail : "Not accepted.");
  return told;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const { file, ...fields } = Object.fromEntries(new FormData(form));
  if (!fields.kind) delete fields.kind;
  if (!fields.artifact && !file.name) return tell("Choose a file first.");
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    const asked = new URLSearchParams({ name: file.name, ...fields });
    tell((await post(`/admin/import?${asked}`, fields.artifact ? "" : await file.text())).message);
  } catch (error) {
    tell(error instanceof TypeError ? "No connection, or the file is larger than 1 MB." : error.message);
  }
  button.disabled = false;
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-gold]");
  if (!button) return;
  button.disabled = true;
  try {
    const { gold } = await post(`/admin/gold/${button.dataset.gold}`, "{}");
    button.setAttribute("aria-pressed", String(gold));
    button.textContent = gold ? "Known answer" : "Make it known";
  } catch (error) {
    tell(error instanceof TypeError ? "No connection." : error.message);
  }
  button.disabled = false;
});
