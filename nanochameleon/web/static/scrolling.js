/** Scrolls the conversation. Its end is that of the last turn: what follows, such as the panel of red teaming, is not. */

const $ = (id) => document.getElementById(id);
const SPACE = 24; // pixels between the last turn and the message
const NEAR = 60; // pixels that still count as the end

/** How far the end of the conversation is below the place over the message where it belongs. */
const beyond = () => $("thread").getBoundingClientRect().bottom + SPACE - $("composer").getBoundingClientRect().top;

export const toEnd = () => scrollBy(0, beyond());

/** Carry out a change; where the reader was at the end of the conversation, stay there. */
export function following(change) {
  const wasAtEnd = beyond() < NEAR;
  change();
  if (wasAtEnd && beyond() > 0) toEnd();
}

/** Keep what gets the focus from under the header and from under the message, however high they grow. */
export function keepFocusInSight(header, message) {
  const measure = () => {
    document.documentElement.style.scrollPadding = `${header.offsetHeight + 8}px 0 ${message.offsetHeight + 8}px`;
  };
  const watch = new ResizeObserver(measure);
  for (const element of [header, message]) watch.observe(element);
}
