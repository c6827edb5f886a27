/** The panel of red teaming: who attacks, what with, and the button that logs the conversation. */

import { make } from "./elements.js";

const PLACES = [
  { name: "attacker", label: "Your name", help: "1 to 32 letters, digits, _ or -.", pattern: "[A-Za-z0-9_\\-]{1,32}", required: true },
  { name: "category", label: "Category", help: "What the answers could do harm by, such as violence.", maxLength: 100 },
  { name: "strategy", label: "Strategy", help: "How you try to get there, such as role play.", maxLength: 100 },
]; // prettier-ignore

/** log() sends the conversation; changed() is called after each change of a field.
 *
 *  Returns {values(), fill(values), suggest({category, strategy}), show(sentence, canLog), say(sentence), fail(sentence)}.
 */
export function panelView(element, { log, changed }) {
  const fields = PLACES.map((place) => fieldView(place, changed));
  const notes = make("textarea", { id: "red-team-notes", rows: 2, maxLength: 20_000, oninput: changed });
  const count = make("p", { className: "quiet small" });
  const said = make("p", { role: "status" });
  const error = make("p", { className: "error", role: "alert" });
  const button = make("button", { type: "submit", className: "main" }, "Log conversation");
  const form = make(
    "form",
    { className: "panel stack", "aria-labelledby": "red-team-title", autocomplete: "off" },
    make("h3", { id: "red-team-title" }, "Red team"),
    make("div", { className: "red-team-fields" }, ...fields.map((field) => field.element)),
    make("div", { className: "field" }, make("label", { htmlFor: notes.id }, "Notes"), notes),
    make("div", { className: "row" }, button, count),
    said,
    error,
  );
  const inputs = { ...Object.fromEntries(fields.map((field) => [field.name, field.input])), notes };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    log();
  });
  element.append(form);

  return {
    values: () => Object.fromEntries(Object.entries(inputs).map(([name, input]) => [name, input.value.trim()])),
    fill: (values) => Object.entries(values).forEach(([name, value]) => name in inputs && (inputs[name].value = value)),
    suggest: (used) => fields.forEach((field) => field.suggest(used[field.name] ?? [])),
    show(sentence, canLog) {
      count.textContent = sentence;
      button.disabled = !canLog;
    },
    say(sentence) {
      said.textContent = sentence;
      error.textContent = "";
    },
    fail(sentence) {
      said.textContent = "";
      error.textContent = sentence;
    },
  };
}

function fieldView({ name, label, help, ...properties }, changed) {
  const id = `red-team-${name}`;
  const about = make("p", { className: "help", id: `${id}-help` }, help);
  const list = make("datalist", { id: `${id}-list` });
  const input = make("input", { id, type: "text", oninput: changed, "aria-describedby": about.id, ...properties });
  input.setAttribute("list", list.id);
  const suggest = (words) => list.replaceChildren(...words.map((value) => make("option", { value })));
  const element = make("div", { className: "field" }, make("label", { htmlFor: id }, label), input, about, list);
  return { name, input, element, suggest };
}
