/** Scrolls the conversation. Its end is that of the last turn: what follows, such as the panel of red teaming, is not. */

import { $ } from "./elements.js";

const SPACE = 40; // pixels between the last turn and the message
const NEAR = 60; // pixels that still count as the end

/** How far the end of the conversation is below the place over the message where it belongs. */
function beyond() {
  const place = Math.min(innerHeight, $("composer").getBoundingClientRect().top) - SPACE;
  return $("thread").getBoundingClientRect().bottom - place;
}

export const toEnd = () => scrollBy(0, beyond());

/** Carry out a change; where the reader was at the end of the conversation, stay there. */
export function following(change) {
  const wasAtEnd = beyond() < NEAR;
  change();
  if (wasAtEnd && beyond() > 0) toEnd();
}

/** Tell the style sheet how high header and message are, so that what gets the focus is not under them. */
export function keepFocusInSight(header, message) {
  const { style } = document.documentElement;
  const watch = new ResizeObserver(() => {
    style.setProperty("--header", `${header.offsetHeight + 8}px`);
    style.setProperty("--message", `${message.offsetHeight + 8}px`);
  });
  for (const element of [header, message]) watch.observe(element);
}
