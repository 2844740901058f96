// Typesets what pymdownx.arithmatex marked as maths; KaTeX and its fonts are served by the site itself.
document.querySelectorAll(".arithmatex").forEach((element) => {
  const source = element.textContent.trim().slice(2, -2); // without \( \) or \[ \]
  katex.render(source, element, { displayMode: element.tagName === "DIV", throwOnError: false });
});
