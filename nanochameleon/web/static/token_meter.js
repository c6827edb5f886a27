/** Length against the context: a bar in the colours of the modalities, with its numbers, which are the legend as well. */

import { make } from "./elements.js";

const KINDS = { text: "text", image: "image codes", special: "special" };

/** Return the elements for an answer of /api/tokens. */
export function meter({ tokens, counts, context, mode, left_out: leftOut }) {
  const used = tokens.length;
  const whole = Math.max(used, context);
  const bar = make("div", { className: "meter", "aria-hidden": "true" }); // its numbers follow as text
  const legend = make("ul", { className: "row small legend" });
  for (const [kind, name] of Object.entries(KINDS)) {
    const part = make("span", { className: `part ${kind}-token` });
    part.style.width = `${(100 * counts[kind]) / whole}%`;
    bar.append(part);
    legend.append(make("li", {}, make("span", { className: `swatch ${kind}-token` }), ` ${counts[kind]} ${name}`));
  }
  const end = make("span", { className: "end" });
  end.style.left = `${(100 * context) / whole}%`;
  bar.append(end);
  const words = `${used} of ${context} tokens, read in the mode ${mode}`;
  const parts = [make("p", { className: "small" }, words), bar, legend];
  const earlier = leftOut === 1 ? "1 earlier text or image" : `${leftOut} earlier texts and images`;
  if (leftOut) parts.push(make("p", { className: "small" }, `Not read in this mode: ${earlier}.`));
  if (used > context) {
    const more = `the sequence is ${used - context} tokens longer than the context: the model cannot read it, so it has no probabilities`;
    parts.push(make("p", { className: "error" }, more));
  }
  return parts;
}
