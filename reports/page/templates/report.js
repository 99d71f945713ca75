"use strict";
(() => {
  const root = document.documentElement;

  // A tooltip for what is under the pointer: a point's own words, or the values of the lines at that place.
  const tip = document.getElementById("tip");
  const paths = new WeakMap();

  const points = (path) => {
    if (!paths.has(path)) {
      const found = [];
      let [x, y] = [0, 0];
      for (const [, kind, first, second] of path.getAttribute("d").matchAll(/([MLHV])([\d.]+)(?: ([\d.]+))?/g)) {
        if (kind === "V") y = Number(first);
        else x = Number(first);
        if (second !== undefined) y = Number(second);
        if (kind !== "H") found.push([x, y]);
      }
      paths.set(path, found);
    }
    return paths.get(path);
  };

  const nearest = (found, x) => {
    let [low, high] = [0, found.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (found[middle][0] < x) low = middle + 1;
      else high = middle;
    }
    return low > 0 && x - found[low - 1][0] < found[low][0] - x ? found[low - 1] : found[low];
  };

  const written = (share, [low, high, logarithmic, unit, name]) => {
    const value = logarithmic ? low * (high / low) ** share : low + share * (high - low);
    const text = value.toLocaleString("en", { maximumSignificantDigits: 3 });
    return `${name ? `${name} ` : ""}${text} ${unit}`;
  };

  const values = (chart, event) => {
    const box = chart.getBoundingClientRect();
    const x = (1000 * (event.clientX - box.left)) / box.width;
    if (!chart.dataset.axes || x < 0 || x > 1000) return "";
    const [across, upward] = JSON.parse(chart.dataset.axes);
    let at = null;
    const rows = [];
    for (const line of chart.querySelectorAll("[data-name]")) {
      const drawn = line.firstElementChild;
      const path = drawn.localName === "use" ? document.querySelector(drawn.getAttribute("href")) : drawn;
      const found = nearest(points(path), x);
      if (!found || Math.abs(found[0] - x) > 60) continue;
      at ??= found[0];
      rows.push(`${line.dataset.name}: ${written(1 - found[1] / 1000, upward)}`);
    }
    return rows.length ? [written(at / 1000, across), ...rows].join("\n") : "";
  };

  addEventListener("pointermove", (event) => {
    const point = event.target.closest("[data-tip]");
    const chart = event.target.closest(".frame")?.querySelector(".chart");
    const text = point ? point.dataset.tip : chart ? values(chart, event) : "";
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const right = event.clientX + 14 + tip.offsetWidth > innerWidth;
    tip.style.left = `${Math.max(4, right ? event.clientX - tip.offsetWidth - 14 : event.clientX + 14)}px`;
    tip.style.top = `${event.clientY + 14}px`;
  });

  // Paper is white and shows what is folded, but tables that only a screen can scroll.
  addEventListener("beforeprint", () => {
    root.dataset.theme = "light";
    for (const details of document.querySelectorAll("details:not(.numbers)")) {
      details.dataset.was = details.open ? "open" : "";
      details.open = true;
    }
  });
  addEventListener("afterprint", () => {
    delete root.dataset.theme;
    for (const details of document.querySelectorAll("details:not(.numbers)")) {
      details.open = details.dataset.was === "open";
    }
  });

  const choose = (name) => {
    for (const each of document.querySelectorAll("[data-variant]")) each.hidden = each.dataset.variant !== name;
  };
  for (const choice of document.querySelectorAll("input[name=front]")) {
    choice.addEventListener("change", () => choose(choice.value));
    if (choice.checked) choose(choice.value);
  }

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

  const data = () => JSON.parse(document.getElementById("data").textContent);
  const save = (name, type, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  document.getElementById("download-json").addEventListener("click", () => {
    save("backbench-report.json", "application/json", JSON.stringify(data(), null, 1));
  });
  document.getElementById("download-csv").addEventListener("click", () => {
    save("backbench-report.csv", "text/csv", data().csv);
  });
})();
