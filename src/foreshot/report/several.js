// The one script of a page about several runs: a click sorts, words filter.
const table = document.querySelector("table.runs");
const heads = [...table.tHead.rows[0].cells];
const rows = [...table.tBodies[0].rows];
const isNumber = (key) => key !== "" && !isNaN(key);

function compare(x, y) {
  if (isNumber(x) && isNumber(y)) return x - y;
  return isNumber(y) - isNumber(x) || x.localeCompare(y, "en");
}

heads.forEach((head, at) => {
  head.firstElementChild.onclick = () => {
    const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", way === 1 ? "ascending" : "descending");
    rows.sort((a, b) => way * compare(a.cells[at].dataset.key, b.cells[at].dataset.key));
    table.tBodies[0].append(...rows);
  };
});

document.querySelector("input").oninput = (event) => {
  const words = event.target.value.toLowerCase().split(/\s+/);
  for (const row of rows) row.hidden = !words.every((word) => row.dataset.text.includes(word));
  document.querySelector("output").value = rows.filter((row) => !row.hidden).length;
};
document.querySelector(".tools").hidden = false;
