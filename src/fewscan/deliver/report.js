// Sorting, and flickering between two pictures; the page reads the same without it.
for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    head.tabIndex = 0;
    const sort = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      const body = table.tBodies[0];
      const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent;
      const order = (a, b) => {
        const [x, y] = [key(a), key(b)];
        const by = isNaN(x) || isNaN(y) ? x.localeCompare(y, "en", { numeric: true }) : x - y;
        return up ? by : -by;
      };
      body.append(...[...body.rows].sort(order));
      table.querySelectorAll("thead th").forEach((th) => th.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
  });
}
for (const box of document.querySelectorAll(".flicker")) {
  const button = box.querySelector("button");
  const [fixed, ...others] = box.querySelectorAll("input[type=radio]");
  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    button.setAttribute("aria-pressed", "false");
  };
  const start = () => {
    const other = others.find((state) => state.checked) ?? others.at(-1);
    timer = setInterval(() => { (fixed.checked ? other : fixed).checked = true; }, 600);
    button.setAttribute("aria-pressed", "true");
  };
  button.hidden = false;
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => (timer === null ? start() : stop()));
  box.addEventListener("change", (event) => event.target.type === "radio" && stop());
}
