/** What the page says in passing: a notice with a way back, and words for screen readers. */

import { $, button, keepingFocus, make } from "./elements.js";
import { following } from "./scrolling.js";

/** Show a sentence, with one thing that can be done about it: [words, function]. */
export function notice(sentence, action) {
  const act = action && button(action[0], () => (closeNotice(), action[1]()));
  const close = button("Close", closeNotice, { className: "plain" });
  const parts = [make("p", { className: "sentence" }, sentence), act, close];
  following(() => {
    $("notice").replaceChildren(...parts.filter(Boolean));
    $("notice").hidden = false;
  });
  announce(sentence);
}

export function closeNotice() {
  const hide = () => ($("notice").hidden = true);
  keepingFocus(hide, () => document.querySelector("#parts > :last-child textarea"));
}

/** Say something to screen readers alone. */
export function announce(sentence) {
  $("status").textContent = sentence;
}
