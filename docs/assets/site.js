// A reader without a mouse can scroll a wide code block or table only if the element takes the focus.
document.querySelectorAll("pre > code, .md-typeset table").forEach((element) => {
  element.tabIndex = 0;
  // Without a mouse, the theme takes the focus from a code block again.
  new MutationObserver(() => element.tabIndex < 0 && (element.tabIndex = 0)).observe(element, { attributeFilter: ["tabindex"] });
});
// The name of the menu of versions must contain the visible text. The theme adds the menu later.
const topic = document.querySelector(".md-header__topic");
new MutationObserver(() => {
  const button = topic.querySelector(".md-version__current");
  if (button) button.setAttribute("aria-label", `Select version: ${button.textContent.trim()}`);
}).observe(topic, { childList: true, subtree: true });
