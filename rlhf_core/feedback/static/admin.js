// Sends the chosen file as it is, with how to read it in the address.

const form = document.getElementById("import");
const notice = document.getElementById("notice");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const { file, ...fields } = Object.fromEntries(new FormData(form));
  if (!fields.kind) delete fields.kind;
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    const answer = await fetch(`/admin/import?${new URLSearchParams({ name: file.name, ...fields })}`, {
      method: "POST",
      headers: { "X-CSRF-Token": document.querySelector("meta[name=csrf]").content, Accept: "application/json" },
      body: await file.text(),
    });
    const told = await answer.json();
    notice.textContent = answer.ok ? told.message : typeof told.detail === "string" ? told.detail : "Not accepted.";
  } catch {
    notice.textContent = "No connection, or the file is larger than 1 MB.";
  }
  notice.hidden = false;
  button.disabled = false;
});
