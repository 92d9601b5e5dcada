// A reader without a mouse can scroll a wide code block or table only if the element takes the focus.
document.querySelectorAll("pre > code, .md-typeset table").forEach((element) => {
  element.tabIndex = 0;
  // Without a mouse, the theme takes the focus from a code block again.
  new MutationObserver(() => element.tabIndex < 0 && (element.tabIndex = 0)).observe(element, { attributeFilter: ["tabindex"] });
});
