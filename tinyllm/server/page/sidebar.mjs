// The list of conversations: open, rename, delete, export, import.

import { download, find, h, iconButton } from "./dom.mjs";

export class Sidebar {
  /** `actions`: open(id), renamed(id, title), remove(id), imported(text). */
  constructor(store, actions) {
    this.store = store;
    this.actions = actions;
    this.list = find("#conversations");
    find("#export").addEventListener("click", () => download("tinyllm-conversations.json", store.exported()));
    const file = find("#import-file");
    find("#import").addEventListener("click", () => file.click());
    file.addEventListener("change", async () => {
      if (file.files[0]) actions.imported(await file.files[0].text());
      file.value = "";
    });
    find("#sidebar-open").addEventListener("click", () => this.slide(true));
    find("#sidebar-close").addEventListener("click", () => this.slide(false));
    find("#shade").addEventListener("click", () => this.slide(false));
    find("#sidebar").addEventListener("keydown", (event) => event.key === "Escape" && this.slide(false));
  }

  show(current) {
    this.list.replaceChildren(...this.store.list().map((c) => this.#line(c, c.id === current)));
  }

  /** On a narrow screen the list lies over the page, and the page waits. */
  slide(open) {
    if (document.body.classList.contains("sidebar-open") === open) return;
    document.body.classList.toggle("sidebar-open", open);
    find("#room").inert = open;
    find("#sidebar-open").setAttribute("aria-expanded", String(open));
    find(open ? "#sidebar-close" : "#sidebar-open").focus();
  }

  #line({ id, title }, current) {
    const name = title || "Untitled";
    const line = h(
      "li",
      { class: current ? "current" : null },
      h("button", { type: "button", class: "open", "aria-current": current ? "true" : null, onclick: () => this.actions.open(id) }, name),
      iconButton("edit", `Rename ${name}`, () => this.#rename(line, id, name)),
      iconButton("bin", `Delete ${name}`, () => this.#sure(line, id, name)),
    );
    return line;
  }

  #rename(line, id, name) {
    const box = h("input", { type: "text", "aria-label": "The conversation's name", value: name });
    let open = true;
    const end = (save) => {
      if (!open) return;
      open = false;
      this.actions.renamed(id, save && box.value.trim() ? box.value.trim() : name);
    };
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === "Escape") {
        event.stopPropagation();
        end(event.key === "Enter");
      }
    });
    box.addEventListener("blur", () => end(true));
    line.replaceChildren(box);
    box.select();
  }

  #sure(line, id, name) {
    const no = h("button", { type: "button", class: "quiet-button", onclick: () => this.actions.renamed(id, name) }, "Keep");
    const yes = h("button", { type: "button", class: "danger-button", onclick: () => this.actions.remove(id) }, "Delete");
    line.replaceChildren(h("span", { class: "ask" }, "Delete it?"), no, yes);
    no.focus();
  }
}
