/** Makes elements. Text reaches the page as text nodes alone. */

export const $ = (id) => document.getElementById(id);

/** make("button", {type: "button", className: "quiet"}, "Send"): an element with properties and children.
 *  Properties that have a hyphen or are not the element's own are set as attributes. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** A button with words; onclick may be async. */
export function button(words, onclick, properties = {}) {
  return make("button", { type: "button", onclick, ...properties }, words);
}

/** Carry out a change that may hide, disable, remove or move the focused element.
 *
 *  The focus stays where it is; where it cannot, fallback() takes it.
 */
export function keepingFocus(change, fallback) {
  const focused = document.activeElement;
  change();
  if (focused === document.body) return;
  const canStay = !focused.disabled && focused.checkVisibility({ visibilityProperty: true });
  if (!canStay) fallback().focus();
  else if (document.activeElement !== focused) focused.focus();
}
