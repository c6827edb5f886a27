/** Where arrow keys lead from a token: along the sequence, and from line to line. Folded tokens are passed over. */

const SAME_LINE = 6; // pixels that tops of one line may differ by

const isShown = (button) => !button.closest("[hidden]");

/** The next shown token after i, in steps of 1 or -1; null at the end. */
export function nextShown(buttons, i, step) {
  for (let k = i + step; k >= 0 && k < buttons.length; k += step) if (isShown(buttons[k])) return k;
  return null;
}

/** The token nearest to i on the line below (1) or above (-1). */
function nextLine(buttons, i, step) {
  const from = buttons[i].getBoundingClientRect();
  const middle = from.left + from.width / 2;
  let line = null;
  let best = { distance: Infinity, place: null };
  for (let k = nextShown(buttons, i, step); k !== null; k = nextShown(buttons, k, step)) {
    const { top, left, width } = buttons[k].getBoundingClientRect();
    if (line === null && Math.abs(top - from.top) < SAME_LINE) continue;
    line ??= top;
    if (Math.abs(top - line) >= SAME_LINE) break;
    const distance = Math.abs(left + width / 2 - middle);
    if (distance < best.distance) best = { distance, place: k };
  }
  return best.place;
}

/** Key -> function(buttons, i), which returns a place, or null where there is none. */
export const MOVES = {
  ArrowRight: (buttons, i) => nextShown(buttons, i, 1),
  ArrowLeft: (buttons, i) => nextShown(buttons, i, -1),
  ArrowDown: (buttons, i) => nextLine(buttons, i, 1),
  ArrowUp: (buttons, i) => nextLine(buttons, i, -1),
  Home: (buttons) => nextShown(buttons, -1, 1),
  End: (buttons) => nextShown(buttons, buttons.length, -1),
};
