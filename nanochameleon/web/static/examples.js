/** Shows on an empty page what this is, and messages to begin with. */

import { button, make } from "./elements.js";

const NEUTRAL = [
  { messages: ["a red apple on a wooden table"] },
  { messages: ["a lighthouse at night, and one sentence about it"], mode: "free" },
  { messages: ["a bowl of fruit", "what is in this image?"] },
];

/** Fill the place. take(example) sends the first of example.messages; the next waits in the composer. */
export function showExamples(element, settings, take) {
  const { can_draw: canDraw } = settings.model;
  const kinds = canDraw ? "words and images" : "words, and reads images";
  const examples = settings.examples ?? (canDraw ? NEUTRAL : [{ messages: ["What can you do?"] }]);
  element.replaceChildren(
    make("h3", {}, "Write words, add images"),
    make("p", { className: "quiet" }, `One model reads them in any order, as one sequence of tokens, and writes ${kinds}.`),
    make("ul", { className: "examples", "aria-label": "Examples" }, ...examples.map((example) => entry(example, take))),
  );
}

function entry(example, take) {
  const [first, ...later] = example.messages;
  const start = button(first, () => take(example), { className: "example" });
  start.append(...later.map((message) => make("span", { className: "quiet small" }, `then: ${message}`)));
  return make("li", {}, start);
}
