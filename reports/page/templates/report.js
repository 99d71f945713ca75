"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);

  // Figures name their colours as CSS variables; the theme in use decides what those are.
  const resolve = (value, styles) => {
    if (typeof value === "string") {
      return value.startsWith("var(") ? styles.getPropertyValue(value.slice(4, -1)).trim() : value;
    }
    if (Array.isArray(value)) {
      return typeof value[0] === "number" ? value : value.map((each) => resolve(each, styles));
    }
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, resolve(each, styles)]));
    }
    return value;
  };

  const draw = (width) => {
    const styles = getComputedStyle(root);
    for (const place of document.querySelectorAll("[data-figure]")) {
      const figure = data.figures[place.dataset.figure];
      const layout = resolve(figure.layout, styles);
      if (width) Object.assign(layout, { width, autosize: false });
      else layout.autosize = true;
      const options = { responsive: true, displayModeBar: false, displaylogo: false };
      Plotly.react(place, resolve(figure.data, styles), layout, options);
    }
  };

  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  // Paper is white and narrower than a screen.
  addEventListener("beforeprint", () => {
    root.dataset.theme = "light";
    for (const details of document.querySelectorAll("details")) {
      details.dataset.was = details.open ? "open" : "";
      details.open = true;
    }
    draw(640);
  });
  addEventListener("afterprint", () => {
    delete root.dataset.theme;
    for (const details of document.querySelectorAll("details")) details.open = details.dataset.was === "open";
    draw();
  });

  const sortKey = (row, column) => {
    const text = row.cells[column].dataset.sort;
    const number = Number(text);
    return text === "" || text === undefined ? null : Number.isNaN(number) ? text : number;
  };

  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });

  const sort = (table, column) => {
    const head = table.tHead.rows[0].cells[column];
    const descending = head.getAttribute("aria-sort") === "ascending";
    for (const each of table.tHead.rows[0].cells) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => {
      const [left, right] = [sortKey(a, column), sortKey(b, column)];
      if (left === null || right === null) return (left === null) - (right === null); // absent values last
      return descending ? compare(right, left) : compare(left, right);
    });
    table.tBodies[0].append(...rows);
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => sort(table, column));
    });
  }

  const save = (name, type, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  document.getElementById("download-json").addEventListener("click", () => {
    save("backbench-report.json", "application/json", JSON.stringify(data, null, 1));
  });
  document.getElementById("download-csv").addEventListener("click", () => {
    save("backbench-report.csv", "text/csv", data.csv);
  });
})();
