/** What the page says in passing: a notice with a way back, and words for screen readers. */

import { button } from "./elements.js";

/** Show a sentence, with one thing that can be done about it: [words, function]. */
export function notice(sentence, action) {
  const element = document.getElementById("notice");
  const close = () => {
    const held = element.contains(document.activeElement);
    element.hidden = true;
    if (held) document.querySelector("#parts textarea").focus();
  };
  const act = action && button(action[0], () => (close(), action[1]()));
  element.replaceChildren(sentence, ...(act ? [act] : []), button("Close", close, { className: "plain" }));
  element.hidden = false;
  announce(sentence);
}

/** Say something to screen readers alone. */
export function announce(sentence) {
  document.getElementById("status").textContent = sentence;
}
