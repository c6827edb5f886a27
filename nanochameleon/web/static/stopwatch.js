/** Measures how long a person looks at a question: the seconds in which the page was visible.
 *
 *  It pauses while the page is hidden (another tab, a minimised window, a locked screen), and stops at `most`.
 */
export function stopwatch(most) {
  let sum = 0; // milliseconds before the page was last hidden
  let since = null; // when it was last shown; null while it is hidden
  const now = () => (document.visibilityState === "visible" ? performance.now() : null);

  document.addEventListener("visibilitychange", () => {
    if (since !== null) sum += performance.now() - since;
    since = now();
  });
  return {
    restart() {
      sum = 0;
      since = now();
    },
    seconds() {
      const running = since === null ? 0 : performance.now() - since;
      return Math.min(most, (sum + running) / 1000);
    },
  };
}
