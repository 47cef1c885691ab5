"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null; // by the button
  const dark = () => chosen ?? system.matches;
  const colours = {
    light: ["#2a6fc9", "#c2571a", "#1a8a5f", "#8549b8", "#b8860b", "#c73a52", "#3d8896", "#6b6a66"],
    dark: ["#6ba6f0", "#f0935a", "#4fc796", "#bd8cec", "#e0b84d", "#f0788c", "#6cc3d1", "#b0afa9"],
  };
  const colour = (run) => colours[dark() ? "dark" : "light"][run % 8];
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const config = { responsive: true, displaylogo: false, displayModeBar: false };

  function layout(more) {
    const axis = { gridcolor: style("--line"), zeroline: false, linecolor: style("--line"), automargin: true };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: style("--dim"), size: 12, family: "inherit" },
      margin: { l: 48, r: 12, t: 10, b: 40 },
      hoverlabel: { bgcolor: style("--card"), bordercolor: style("--line"), font: { color: style("--ink") } },
      ...more,
      xaxis: { ...axis, title: { text: "step" }, ...more.xaxis },
      yaxis: { ...axis, ...more.yaxis },
    };
  }

  function curve(chart) {
    const sets = [...new Set(chart.series.map((one) => one.label))];
    const traces = chart.series.map((one) => ({
      x: one.x, y: one.y, type: "scatter", mode: one.x.length > 60 ? "lines" : "lines+markers",
      name: data.runs[one.run] + (one.label ? " " + one.label : ""),
      line: { color: colour(one.run), width: 2, dash: dashes[sets.indexOf(one.label) % 4] },
      marker: { color: colour(one.run), size: 4 },
      hovertemplate: "%{y:.5~g}",
    }));
    const zero = ["tokens-per-second", "dead-experts", "memory-gib", "lr"].includes(chart.id);
    Plotly.react(chart.id, traces, layout({
      hovermode: "x unified", showlegend: sets.length > 1, legend: { orientation: "h", y: -0.25 },
      yaxis: zero ? { rangemode: "tozero" } : {},
    }), config);
  }

  const bar = (more) => ({ thickness: 12, outlinewidth: 0, tickfont: { color: style("--dim") }, ...more });
  const steps = (map) => ({ type: "category", nticks: 8, showgrid: false, tickangle: 0, categoryorder: "array", categoryarray: map.steps.map(String) });
  const sums = (rows) => rows[0].map((_, column) => rows.reduce((sum, row) => sum + row[column], 0));

  function layers(map, run) {
    const z = map.tokens.map((rows) => {
      const total = sums(rows);
      return total.map((sum, column) => sum ? Math.max(...rows.map((row) => row[column])) * rows.length / sum : null);
    });
    const low = dark() ? "#26262a" : "#f4f4f1", high = dark() ? "#f0935a" : "#b8450c";
    const most = Math.max(2, ...z.flat().filter((value) => value !== null));
    Plotly.react(`layers-${run}`, [{
      type: "heatmap", x: map.steps.map(String), y: map.layers.map(short), z, zmin: 1, zmax: most,
      colorscale: [[0, low], [1, high]], colorbar: bar({}), xgap: z[0].length < 60 ? 1 : 0, ygap: 1,
      hovertemplate: "step %{x}<br>%{y}<br>busiest expert: %{z:.2f} times the mean<extra></extra>",
    }], layout({ xaxis: steps(map), yaxis: { type: "category", autorange: "reversed", showgrid: false } }), config);
  }

  function experts(map, run) {
    const rows = map.tokens[Number(document.getElementById(`layer-${run}`).value)];
    const total = sums(rows);
    // On a scale of powers of two; no token at all is below the scale.
    const ratio = rows.map((row) => row.map((tokens, column) => total[column] ? tokens * rows.length / total[column] : null));
    const z = ratio.map((row) => row.map((value) => value === null ? null : value ? Math.max(-2, Math.min(2, Math.log2(value))) : -2.5));
    const text = rows.map((row, e) => row.map((tokens, column) => `${tokens} tokens, ${ratio[e][column]?.toFixed(2)} times the mean`));
    const middle = dark() ? "#3a3a3a" : "#efefec", dead = dark() ? "#000000" : "#202020";
    const scale = [[0, dead], [0.1, dead], [0.1, dark() ? "#5b9df0" : "#2462b5"], [0.555, middle], [1, dark() ? "#f0935a" : "#c2501a"]];
    Plotly.react(`experts-${run}`, [{
      type: "heatmap", x: map.steps.map(String), y: rows.map((_, e) => String(e)), z, zmin: -2.5, zmax: 2, customdata: text,
      colorscale: scale, xgap: z[0].length < 60 ? 1 : 0, ygap: rows.length < 80 ? 1 : 0,
      colorbar: bar({ tickvals: [-2.5, -2, -1, 0, 1, 2], ticktext: ["no token", "¼ or less", "½", "1", "2", "4 or more"] }),
      hovertemplate: "step %{x}<br>expert %{y}<br>%{customdata}<extra></extra>",
    }], layout({ xaxis: steps(map), yaxis: { type: "category", autorange: "reversed", showgrid: false, nticks: 17, title: { text: "expert" } } }), config);
  }

  const short = (layer) => layer.replace(/^model\./, "");

  function draw() {
    document.documentElement.dataset.theme = dark() ? "dark" : "light";
    for (const mark of document.querySelectorAll("i[data-run]")) mark.style.background = colour(Number(mark.dataset.run));
    data.charts.forEach(curve);
    data.heatmaps.forEach((map, run) => {
      if (!map) return;
      layers(map, run);
      experts(map, run);
    });
    document.documentElement.dataset.drawn = data.charts.length;
  }

  data.heatmaps.forEach((map, run) => {
    if (map) document.getElementById(`layer-${run}`).addEventListener("change", () => experts(map, run));
  });
  document.getElementById("theme").addEventListener("click", () => { chosen = !dark(); draw(); });
  system.addEventListener("change", draw);
  draw();
})();
