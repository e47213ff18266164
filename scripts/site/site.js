// The search, and films that are moved by hand: nothing here needs a kernel.
"use strict";

if (window.PagefindUI) {
  new PagefindUI({
    element: "#search",
    showImages: false,
    showSubResults: true,
    resetStyles: false,
    translations: { placeholder: "Search the lessons" },
  });
}

for (const film of document.querySelectorAll(".film")) {
  const handle = film.querySelector("input");
  const picture = film.querySelector("img");
  const frames = JSON.parse(film.dataset.frames);
  handle.addEventListener("input", () => {
    picture.src = frames[handle.value];
    handle.setAttribute("aria-valuetext", `${Number(handle.value) + 1} of ${frames.length}`);
  });
  frames.forEach((frame) => (new Image().src = frame)); // so that none comes late
}
