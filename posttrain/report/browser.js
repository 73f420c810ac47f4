/* The rollout browser: filters, a list, and the selected rollout. Model output only ever becomes text. */

function browser(root) {
  const form = root.querySelector("form");
  const list = root.querySelector("[role=listbox]");
  const found = root.querySelector(".found");
  const detail = root.querySelector(".detail");
  const rows = report.rollouts;
  const items = rows.map(item);
  const field = (name) => form.elements.namedItem(name);
  let shown = [];
  let current = -1;

  const KINDS = {
    "any": () => true,
    "trained": (row) => row.status === "trained",
    "dropped": (row) => row.status !== null && row.status.startsWith("dropped"),
    "correct": (row) => row.correct === true,
    "wrong": (row) => row.correct === false,
    "unscored": (row) => row.reward === null,
    "truncated": (row) => row.finish === "length",
  };

  function options(select, values, words) {
    const before = select.value;
    select.replaceChildren(...values.map((value, i) => make("option", { value }, words[i])));
    select.value = values.includes(before) ? before : values[0];
  }

  function setUp() {
    const stages = [...new Set(rows.map((row) => row.stage))];
    options(field("stage"), ["", ...stages], ["all stages", ...stages]);
    const kinds = Object.keys(KINDS).filter((kind) => rows.some(KINDS[kind]));
    options(field("kind"), kinds, kinds);
    stepOptions();
  }

  function stepOptions() {
    const stage = field("stage").value;
    const steps = [...new Set(rows.filter((row) => !stage || row.stage === stage).map((row) => row.step))];
    const values = steps.filter((step) => step !== null).sort((a, b) => a - b).map(String);
    options(field("step"), ["", ...values], ["all steps", ...values]);
  }

  function matches(row) {
    const text = field("text").value.trim().toLowerCase();
    const [low, high] = ["low", "high"].map((name) => field(name).value);
    return (
      (!field("stage").value || row.stage === field("stage").value) &&
      (!field("step").value || String(row.step) === field("step").value) &&
      KINDS[field("kind").value](row) &&
      (low === "" || (row.reward !== null && row.reward >= +low)) &&
      (high === "" || (row.reward !== null && row.reward <= +high)) &&
      (!text || [report.prompts[row.p], row.completion, row.answer ?? "", row.id, row.example].some((part) => part.toLowerCase().includes(text)))
    );
  }

  function where(row) {
    const role = row.role === "solution" ? "" : ` ${row.role}`;
    return `${row.example}${role} #${row.index + 1} · ${row.stage}${row.step === null ? "" : ` step ${row.step}`}`;
  }

  function item(row, i) {
    const preview = row.completion.replace(/\s+/g, " ").slice(0, 120) || "(empty)";
    return make("li", { role: "option", id: `rollout-${i}`, "aria-selected": "false", onclick: () => select(i) },
      make("p", {}, make("b", {}, row.reward === null ? "none" : write(row.reward, "number")), make("span", {}, where(row))),
      make("p", {}, preview));
  }

  function filter() {
    shown = rows.map((_, i) => i).filter((i) => matches(rows[i]));
    list.replaceChildren(...shown.map((i) => items[i]));
    found.textContent = shown.length === rows.length ? `${rows.length} rollouts` : `${shown.length} of ${rows.length} rollouts`;
    if (shown.length) select(shown.includes(current) ? current : shown[0]);
    else {
      current = -1;
      detail.replaceChildren(make("p", { class: "empty" }, "No rollout matches these filters."));
    }
  }

  function select(i) {
    if (current >= 0) items[current].setAttribute("aria-selected", "false");
    current = i;
    const chosen = items[i];
    chosen.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", chosen.id);
    if (chosen.offsetTop < list.scrollTop) list.scrollTop = chosen.offsetTop;
    const below = chosen.offsetTop + chosen.offsetHeight - list.clientHeight;
    if (below > list.scrollTop) list.scrollTop = below;
    detail.replaceChildren(...describe(rows[i], i));
    detail.scrollTop = 0;
  }

  function step(by) {
    const next = shown[shown.indexOf(current) + by];
    if (next !== undefined) select(next);
  }

  function describe(row, i) {
    const place = shown.indexOf(i);
    return [
      make("header", {},
        make("h3", {}, where(row)),
        make("div", {},
          make("button", { type: "button", onclick: () => step(-1), ...(place === 0 ? { disabled: "" } : {}) }, "← Previous"),
          make("button", { type: "button", onclick: () => step(1), ...(place === shown.length - 1 ? { disabled: "" } : {}) }, "Next →"))),
      badges(row),
      siblings(row, i),
      make("h4", {}, "Prompt"), make("pre", { class: "text" }, report.prompts[row.p]),
      make("h4", {}, "Completion"), make("pre", { class: "text completion" }, row.completion || "(empty)"),
      ...(row.answer === null ? [] : [make("h4", {}, "Reference answer"), make("pre", { class: "text" }, row.answer)]),
      make("div", { class: "columns" }, rewards(row), provenance(row)),
      ...tokenChart(row),
    ];
  }

  function badge(name, value, kind = "") {
    return make("span", { class: `badge ${kind}` }, `${name} `, make("b", {}, value));
  }

  function badges(row) {
    const dropped = row.status !== null && row.status !== "trained";
    return make("p", { class: "badges" },
      row.reward === null ? badge("reward", "unscored", "bad") : badge("reward", write(row.reward, "number")),
      row.correct === null || row.correct === undefined ? null : row.correct ? badge("judged", "correct", "good") : badge("judged", "wrong", "bad"),
      row.finish === "length" ? badge("cut at", "the token cap", "warn") : badge("ended by", row.finish),
      badge("tokens", row.tokens.toLocaleString("en")),
      row.status === null ? null : badge("status", row.status, dropped ? "warn" : ""));
  }

  function siblings(row, i) {
    const group = rows.map((_, j) => j).filter((j) => rows[j].stage === row.stage && rows[j].step === row.step && rows[j].group === row.group);
    const elsewhere = rows.some((other) => other.example === row.example && !(other.stage === row.stage && other.group === row.group && other.step === row.step));
    return make("div", { class: "siblings" },
      ...(group.length > 1 ? [make("span", {}, "Rewards in this group:")] : []),
      ...(group.length > 1 ? group.map((j) => make("button", {
        type: "button", "aria-current": String(j === i), "aria-label": `Completion ${rows[j].index + 1}, reward ${write(rows[j].reward, "number")}`,
        onclick: () => { if (!shown.includes(j)) form.reset(); select(j); },
      }, write(rows[j].reward, "number"))) : []),
      elsewhere ? make("button", { type: "button", onclick: () => { clear(); field("text").value = row.example; filter(); } }, "This problem elsewhere") : null);
  }

  function pairs(title, entries) {
    return make("div", {}, make("h4", {}, title), make("dl", { class: "pairs" }, ...entries.flatMap(([name, value, kind]) =>
      [make("dt", {}, name), make("dd", { class: kind ?? "" }, value)])));
  }

  function rewards(row) {
    const entries = Object.entries(row.rewards).filter(([name]) => !(name in row.errors))
      .map(([name, value]) => [name, value === null ? "does not apply" : write(value, "fine")]);
    const errors = Object.entries(row.errors).map(([name, message]) => [name, message, "error"]);
    const advantages = Object.entries(row.advantages).map(([name, [mean, low, high]]) =>
      [`advantage, ${name}`, low === high ? write(mean, "fine") : `mean ${write(mean, "fine")}, from ${write(low, "fine")} to ${write(high, "fine")}`]);
    return pairs("Rewards and advantages", [...entries, ...errors, ...advantages]);
  }

  function provenance(row) {
    return pairs("Where it comes from", [
      ["rollout", row.id], ["example", row.example], ["role", row.role], ["policy version", String(row.version)],
      ["sampling seed", row.seed], ["prompt", `${row.promptTokens.toLocaleString("en")} tokens`],
    ]);
  }

  /* One bar a token: how surprising it was to the policy that sampled it. */
  function tokenChart(row) {
    const { ids, logprobs, mask, advantages } = row.perToken;
    if (!ids.length) return [];
    const surprise = logprobs.map((value) => (value === null ? 0 : -value));
    const most = Math.max(...surprise, 1);
    const bars = ids.map((id, t) => {
      const height = Math.max(1, (surprise[t] / most) * 44);
      const masked = mask !== null && mask[t] === 0;
      const gain = Object.entries(advantages).map(([name, values]) => `, advantage ${name} ${write(values[t], "fine")}`).join("");
      return svg("rect", { x: t * 5, y: 46 - height, width: 4, height, class: masked ? "masked" : "" },
        svg("title", {}, `token ${t + 1}, id ${id}: log-prob ${write(logprobs[t], "fine")}${gain}${masked ? ", not trained on" : ""}`));
    });
    const cut = ids.length < row.tokens ? `, the first ${ids.length} of ${row.tokens.toLocaleString("en")}` : "";
    const title = `Surprise of each token (−log-prob, up to ${write(most, "number")})${cut}`;
    return [make("h4", {}, title), make("div", { class: "tokens" },
      svg("svg", { width: ids.length * 5, height: 46, role: "img", "aria-label": title }, ...bars))];
  }

  function clear() {
    for (const element of form.elements) if (element.name) element.value = element.name === "kind" ? "any" : "";
    stepOptions();
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (event.target.name === "stage") stepOptions();
    filter();
  });
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    clear();
    filter();
  });
  list.addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    const place = Math.min(Math.max(shown.indexOf(current) + by, 0), shown.length - 1);
    if (shown.length) select(shown[place]);
  });
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, textarea, [role=listbox]") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "j") step(1);
    if (event.key === "k") step(-1);
  });
  setUp();
  filter();
}

for (const root of document.querySelectorAll(".browser")) browser(root);
document.documentElement.dataset.ready = "true";
