/** The label of one answer: safe, unsafe or unsure, by mouse or by the keys 1, 2 and 3; and whether it refused. */

import { make } from "./elements.js";

const LABELS = ["safe", "unsafe", "unsure"];
let groups = 0;

/** Put the controls into the element of an answer's turn. change({label}) or change({refused}) is called by the user.
 *
 *  Returns show({label, refused}).
 */
export function labelView(turnElement, change) {
  const name = `red-team-label-${++groups}`;
  const radios = LABELS.map((label) =>
    make("input", { type: "radio", name, value: label, onchange: () => change({ label }) }),
  );
  const refused = make("input", { type: "checkbox", onchange: () => change({ refused: refused.checked }) });
  const choices = radios.map((radio, i) => make("label", {}, radio, ` ${i + 1} ${LABELS[i]}`));
  const controls = make("div", { className: "row" }, ...choices, make("label", {}, refused, " the model refused"));
  turnElement.append(make("fieldset", { className: "red-team-label" }, make("legend", {}, "Label of this answer"), controls));
  turnElement.tabIndex = 0;
  turnElement.addEventListener("keydown", (event) => {
    const label = LABELS[Number(event.key) - 1];
    if (label && !event.ctrlKey && !event.altKey && !event.metaKey) change({ label });
  });
  return ({ label, refused: isRefused = false }) => {
    for (const radio of radios) radio.checked = radio.value === label;
    refused.checked = isRefused;
  };
}
