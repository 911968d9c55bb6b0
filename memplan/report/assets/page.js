// The timeline: stacked areas by category, and what is alive at the moment under the cursor.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const chart = document.getElementById("chart");
  const cut = document.getElementById("cut");
  const GIB = 2 ** 30, MIB = 2 ** 20;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

  // Sizes come in units of the allocator's 512 bytes.
  const categories = data.categories;
  const live = data.live.map((column) => column.map((blocks) => blocks * 512));
  const stacked = [];
  for (const column of live) {
    const below = stacked[stacked.length - 1];
    stacked.push(below ? column.map((bytes, i) => bytes + below[i]) : column);
  }
  const total = stacked[stacked.length - 1];
  const ground = data.ground * 512; // weights, adapters and what else never changes
  const top = total[data.peak];

  function number(value, digits, fixed) {
    return value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: fixed || 0 });
  }

  function size(bytes) {
    if (bytes >= GIB) return number(bytes / GIB, 2, 2) + " GiB";
    if (bytes >= MIB) return number(bytes / MIB, 1, 1) + " MiB";
    return number(bytes / 1024, 1) + " KiB";
  }

  function element(tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function swatch(category) {
    const made = element("span", "", "swatch");
    made.style.background = `var(--${category})`;
    return made;
  }

  function row(cells) {
    const made = element("tr");
    for (const [content, className] of cells) {
      const cell = element("td", undefined, className);
      cell.append(...(Array.isArray(content) ? content : [content]));
      made.append(cell);
    }
    return made;
  }

  function show(index) {
    const [phase, layer, operation, module] = data.where[index];
    const place = data.texts[phase] + (layer === null ? "" : ` of layer ${layer}`);
    const inside = data.texts[module] ? ` in ${data.texts[module]}` : "";
    document.getElementById("when").textContent =
      `${size(total[index])}${index === data.peak ? ", the peak" : ""}: ${place}, at ${data.texts[operation]}${inside} (event ${number(data.events[index] + 1, 0)})`;
    document.getElementById("live").replaceChildren(
      ...categories.map(([key, label], i) => row([[[swatch(key), label]], [live[i][index] ? size(live[i][index]) : "0", "number"]])).reverse());
    const held = data.held[index];
    const rows = [];
    for (let i = 0; i < held.length; i += 2) {
      const [name, blocks, category] = data.kinds[held[i]];
      const count = held[i + 1], each = blocks * 512;
      rows.push(row([
        [[swatch(categories[category][0]), data.texts[name]], "name"],
        [count > 1 ? `${count} × ${size(each)}` : "", "number wide"],
        [size(count * each), "number"],
      ]));
    }
    if (!rows.length) rows.push(row([["none: only what was there before the step", "quiet"]]));
    document.getElementById("tensors").replaceChildren(...rows);
  }

  // Each point needs a pixel or it would be lost between two: where there are fewer, of some points only the
  // lowest and the highest are drawn, in their order.
  function thin(pixels) {
    const count = data.x.length, some = Math.max(1, Math.ceil(count / (pixels * 1.05)));
    const chosen = [], x = [];
    for (let start = 0; start < count; start += some === 1 ? 1 : 2 * some) {
      const stop = some === 1 ? start + 1 : Math.min(start + 2 * some, count);
      let low = start, high = start;
      for (let i = start; i < stop; i++) {
        if (total[i] < total[low]) low = i;
        if (total[i] > total[high]) high = i;
      }
      const pair = low === high ? [low] : low < high ? [low, high] : [high, low];
      pair.forEach((point, i) => { chosen.push(point); x.push(data.x[i ? Math.min(start + some, stop - 1) : start]); });
    }
    return [chosen, x];
  }

  let plot = null, chosen = [], drawnAt = [];

  function annotate(u) {
    const ratio = uPlot.pxRatio, ctx = u.ctx, { left, top: above, width, height } = u.bbox;
    ctx.save();
    ctx.font = `${12 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "left";
    ctx.textBaseline = "top";
    ctx.fillStyle = ctx.strokeStyle = colour("text");
    for (const [name, start, stop] of data.phases) {
      const from = Math.max(u.valToPos(start, "x", true), left);
      const to = Math.min(u.valToPos(stop, "x", true), left + width);
      if (to <= from) continue;
      if (from > left) {
        ctx.globalAlpha = 0.45;
        ctx.setLineDash([4 * ratio, 4 * ratio]);
        ctx.beginPath();
        ctx.moveTo(from, above);
        ctx.lineTo(from, above + height);
        ctx.stroke();
        ctx.globalAlpha = 1;
      }
      const wide = ctx.measureText(name).width + 12 * ratio;
      const x = to - from < wide ? left + width - wide : from;
      if (to - from < wide && to < left + width - 1) continue;
      ctx.fillText(name, x + 6 * ratio, above - 18 * ratio);
    }
    ctx.setLineDash([]);
    const x = u.valToPos(drawnAt[chosen.indexOf(data.peak)], "x", true), y = u.valToPos(top, "y", true);
    if (x >= left && x <= left + width) {
      ctx.beginPath();
      ctx.arc(x, y, 4 * ratio, 0, 2 * Math.PI);
      ctx.fill();
      const said = `peak ${size(top)}`, wide = ctx.measureText(said).width;
      ctx.textBaseline = "bottom";
      ctx.fillText(said, Math.min(Math.max(x - wide / 2, left), left + width - wide), y - 7 * ratio);
    }
    ctx.restore();
  }

  function draw() {
    if (plot) plot.destroy();
    [chosen, drawnAt] = thin((chart.clientWidth - 96) * devicePixelRatio);
    const quiet = colour("quiet"), line = colour("line");
    const axis = { stroke: quiet, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 } };
    const floor = () => (cut.checked ? Math.max(0, ground - 0.04 * (top - ground)) : 0);
    plot = new uPlot({
      width: chart.clientWidth,
      height: window.innerWidth <= 640 ? 260 : 360,
      padding: [26, 24, 0, 0],
      legend: { show: false },
      scales: { x: { time: false }, y: { range: () => [floor(), floor() + (top - floor()) * 1.12] } },
      axes: [
        { ...axis, values: (u, ticks) => ticks.map((tick) => number(tick, 0)), size: 30, label: "events of the step", labelSize: 18, labelGap: 0, labelFont: "12px system-ui, sans-serif" },
        { ...axis, size: (u, at) => 16 + 7 * Math.max(8, ...(at || []).map((label) => label.length)), values: (u, at) => at.map((bytes) => round(bytes, at[1] - at[0])), splits: ticks },
      ],
      series: [{}, ...categories.map(([key]) => ({
        fill: colour(key), stroke: colour(key), width: 0, points: { show: false },
        paths: uPlot.paths.stepped({ align: 1 }),
      }))],
      bands: categories.slice(1).map((_, i) => ({ series: [i + 2, i + 1] })),
      cursor: { y: false, points: { show: false }, drag: { x: true, y: false } },
      hooks: {
        draw: [annotate],
        setCursor: [(u) => show(u.cursor.idx === null || u.cursor.left < 0 ? data.peak : chosen[u.cursor.idx])],
      },
    }, [drawnAt, ...stacked.map((column) => chosen.map((point) => column[point]))], chart);
  }

  // Ticks at round numbers of GiB or MiB, not of bytes.
  function ticks(u, axisIndex, min, max) {
    const room = Math.max(2, Math.floor(u.bbox.height / uPlot.pxRatio / 45));
    const unit = max - min < 2 * MIB ? 1024 : max - min < 2 * GIB ? MIB : GIB;
    const nice = [1, 10, 100, 1000, 10000].flatMap((m) => [1, 2, 5].map((n) => n * m * unit));
    const step = nice.find((candidate) => (max - min) / candidate <= room) || max - min;
    const found = [];
    for (let at = Math.ceil(min / step) * step; at <= max; at += step) found.push(at);
    return found;
  }

  function round(bytes, step) {
    return step >= GIB ? number(bytes / GIB, 2) + " GiB" : number(bytes / MIB, 2) + " MiB";
  }

  chart.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
    if (!by) return;
    event.preventDefault();
    const away = plot.cursor.idx === null || plot.cursor.left < 0;
    const now = away ? chosen.indexOf(data.peak) : plot.cursor.idx;
    const next = Math.min(Math.max(now + by, 0), chosen.length - 1);
    plot.setCursor({ left: plot.valToPos(drawnAt[next], "x"), top: 0 });
  });
  // Where what never changes fills half the picture or more, the axis begins at its end.
  cut.checked = 2 * ground > top && ground < top;
  document.getElementById("ground").textContent = size(ground);
  cut.addEventListener("change", draw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let width = chart.clientWidth;
  window.addEventListener("resize", () => {
    if (chart.clientWidth !== width) { width = chart.clientWidth; draw(); }
  });
  draw();
  show(data.peak);
})();
