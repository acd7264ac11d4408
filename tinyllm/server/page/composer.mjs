// The box that one writes in, with attached text files.

import { find, h, icon, iconButton } from "./dom.mjs";

const LARGEST = 512 * 1024; // bytes of an attached file: more than most contexts hold

export class Composer {
  /** `send({text, files})`, `stop()`, `say(text)` for what went wrong. */
  constructor({ send, stop, say }) {
    Object.assign(this, { send, stop, say });
    this.files = [];
    this.busy = false;
    this.box = find("#prompt");
    const form = find("#composer");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.box.addEventListener("input", () => this.#grow());
    this.box.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.busy) this.submit();
    });
    const input = find("#attach-file");
    find("#attach").addEventListener("click", () => input.click());
    input.addEventListener("change", async () => {
      await this.attach(input.files);
      input.value = "";
    });
    this.#receive(form);
    this.setBusy(false);
  }

  submit() {
    if (this.busy) return this.stop();
    const text = this.box.value.trim();
    if (!text && !this.files.length) return this.box.focus();
    const { files } = this;
    this.files = [];
    this.box.value = "";
    this.#grow();
    this.#showFiles();
    return this.send({ text, files });
  }

  setBusy(busy) {
    this.busy = busy;
    const button = find("#send");
    button.replaceChildren(icon(busy ? "stop" : "send"));
    button.setAttribute("aria-label", busy ? "Stop" : "Send");
    button.title = busy ? "Stop (Esc)" : "Send (Enter)";
  }

  fill(text) {
    this.box.value = text;
    this.#grow();
    this.box.focus();
  }

  async attach(files) {
    for (const file of files) {
      try {
        this.files.push({ name: file.name, text: await textOf(file) });
      } catch (error) {
        this.say(error.message);
      }
    }
    this.#showFiles();
    this.box.focus();
  }

  /** Files may also be dropped on the page or pasted. */
  #receive(form) {
    addEventListener("dragover", (event) => {
      event.preventDefault();
      form.classList.add("target");
    });
    addEventListener("dragleave", (event) => event.relatedTarget === null && form.classList.remove("target"));
    addEventListener("drop", (event) => {
      event.preventDefault();
      form.classList.remove("target");
      this.attach(event.dataTransfer.files);
    });
    this.box.addEventListener("paste", (event) => {
      if (event.clipboardData.files.length) {
        event.preventDefault();
        this.attach(event.clipboardData.files);
      }
    });
  }

  #showFiles() {
    const list = find("#files");
    list.hidden = !this.files.length;
    list.replaceChildren(
      ...this.files.map((file, k) => {
        const remove = () => {
          this.files.splice(k, 1);
          this.#showFiles();
          this.box.focus();
        };
        return h("li", { class: "chip" }, icon("file"), file.name, iconButton("close", `Remove ${file.name}`, remove, { class: "icon-button small" }));
      }),
    );
  }

  #grow() {
    this.box.style.height = "auto";
    this.box.style.height = `${Math.min(this.box.scrollHeight, 0.4 * innerHeight)}px`;
  }
}

/** A file's text. Throws, in words, where it has none. */
async function textOf(file) {
  if (file.size > LARGEST) throw new Error(`${file.name} is too large: at most ${LARGEST / 1024} KB of text can be attached.`);
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (!text.includes("\0")) return text;
  } catch {
    // Falls through: it is no text.
  }
  throw new Error(`${file.name} is not a text file.`);
}
