// Looks into every frame of the page for what a person would stumble over, and leaves it as JSON in #found.

const channels = (color) => (color.match(/[\d.]+/g) || []).map(Number);
const clear = (color) => channels(color).length === 4 && channels(color)[3] === 0;

// WCAG 2: relative luminance, and the contrast of two colours.
function luminance(color) {
  const [r, g, b] = channels(color).map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(a, b) {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}

function look(frame) {
  const page = frame.contentDocument;
  const view = frame.contentWindow;
  const width = view.innerWidth;
  const found = { faint: [], outside: [], cut: [], small: [] };
  const backdrop = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = view.getComputedStyle(e).backgroundColor;
      if (!clear(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  page.querySelectorAll("details").forEach((each) => (each.open = true));
  for (const element of page.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    const style = view.getComputedStyle(element);
    const drawing = element.closest("svg");
    const said = `${element.tagName} ${element.textContent.trim().slice(0, 40)}`;
    const scrolls = element.parentElement.closest(".scroll, pre") || element.closest(".unseen");
    if (box.width && !drawing && !scrolls && (box.right > width + 1 || box.left < -1)) found.outside.push(said);
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || ["title", "STYLE"].includes(element.tagName)) continue;
    // The figures inside the cells of a grid stand on the cell and not on the page.
    const onCell = drawing && style.textAnchor === "middle" && /--(paper|ink)/.test(element.getAttribute("style"));
    const ink = drawing ? style.fill : style.color;
    if (!onCell && contrast(ink, backdrop(element)) < 4.5) found.faint.push(`${said}: ${ink} on ${backdrop(element)}`);
    if (!drawing) continue;
    const bounds = drawing.getBoundingClientRect();
    const [left, right] = [bounds.left - 6, bounds.right + 6];
    if (box.left < left || box.right > right || box.top < bounds.top - 2 || box.bottom > bounds.bottom + 2)
      found.cut.push(said);
    if (parseFloat(style.fontSize) * (bounds.width / drawing.viewBox.baseVal.width) < 8) found.small.push(said);
  }
  return {
    ...found,
    width,
    scroll: page.documentElement.scrollWidth,
    background: channels(view.getComputedStyle(page.body).backgroundColor),
    drawings: page.querySelectorAll("figure > svg").length,
    title: page.title,
  };
}

addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(look);
  document.getElementById("found").textContent = JSON.stringify(found);
});
