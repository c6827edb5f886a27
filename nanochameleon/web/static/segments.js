/** Shows a turn's segments: {text}, or {codes, url} for an image.
 *
 *  An image that is being drawn has complete: false and total, the number of its codes when whole.
 *  Called again with more, it changes what is new alone: a selection and the place on the page stay.
 */

import { make } from "./elements.js";

export function showSegments(element, segments, alt = "image") {
  segments.forEach((segment, i) => {
    const kind = "text" in segment ? "text" : "image";
    const old = element.children[i];
    const shown = old?.dataset.kind === kind ? old : kind === "text" ? newText() : newImage();
    if (!old) element.append(shown);
    else if (old !== shown) old.replaceWith(shown);
    if (kind === "text") fillText(shown.firstChild, segment.text);
    else fillImage(shown, segment, alt);
  });
  while (element.children.length > segments.length) element.lastChild.remove();
}

function newText() {
  const paragraph = make("p", { className: "segment words", dir: "auto" }, document.createTextNode(""));
  paragraph.dataset.kind = "text";
  return paragraph;
}

function fillText(node, text) {
  if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else node.data = text;
}

function newImage() {
  const figure = make("figure", { className: "segment image" });
  figure.append(make("img", { hidden: true, width: 192, height: 192 }));
  figure.append(make("p", { className: "codes" }));
  figure.append(make("progress", { hidden: true, "aria-label": "codes drawn" }));
  figure.dataset.kind = "image";
  return figure;
}

function fillImage(figure, { codes, url, complete = true, total }, alt) {
  const [image, words, bar] = figure.children;
  image.hidden = !url;
  if (url && image.src !== url) image.src = url;
  image.alt = complete ? alt : `${alt} (unfinished)`;
  words.hidden = Boolean(url);
  words.textContent = complete ? `an image of ${codes.length} codes, which this model cannot show` : "an image begins";
  bar.hidden = complete || !total;
  if (!bar.hidden) Object.assign(bar, { max: total, value: codes.length });
}
