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
  let view = null;

  const begins = (row, word) => Boolean(row.status) && row.status.startsWith(word);
  const place = (row, id) => JSON.stringify([row.stage, row.step, id]);
  const children = new Set(rows.filter((row) => row.parent !== null).map((row) => place(row, row.parent)));

  const KINDS = {
    "any": () => true,
    "trained": (row) => begins(row, "trained"),
    "dropped": (row) => begins(row, "dropped"),
    "unused": (row) => begins(row, "unused"),
    "refused": (row) => begins(row, "refused"),
    "forked": (row) => row.parent !== null || children.has(place(row, row.id)),
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
    const roles = [...new Set(rows.map((row) => row.role))];
    options(field("role"), ["", ...roles], ["all roles", ...roles]);
    field("role").closest("label").hidden = roles.length < 2;
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
      (!field("role").value || row.role === field("role").value) &&
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
    const at = shown.indexOf(i);
    return [
      make("header", {},
        make("h3", {}, where(row)),
        make("div", {},
          make("button", { type: "button", onclick: () => step(-1), ...(at === 0 ? { disabled: "" } : {}) }, "← Previous"),
          make("button", { type: "button", onclick: () => step(1), ...(at === shown.length - 1 ? { disabled: "" } : {}) }, "Next →"))),
      badges(row),
      siblings(row, i),
      ...tree(row, i),
      make("h4", {}, "Prompt"), make("pre", { class: "text" }, report.prompts[row.p]),
      ...completion(row),
      ...(row.answer === null ? [] : [make("h4", {}, "Reference answer"), make("pre", { class: "text" }, row.answer)]),
      make("div", { class: "columns" }, rewards(row), provenance(row)),
      ...tokenChart(row),
    ];
  }

  /* A problem's rollouts as a tree: a lane each, tokens from left to right, joined where they part. */
  function tree(row, i) {
    const family = rows.map((_, j) => j).filter((j) => rows[j].stage === row.stage && rows[j].step === row.step && rows[j].family === row.family);
    if (family.length < 2) return [];
    const ends = Math.max(...family.map((j) => rows[j].branch[3]), 1);
    const lanes = [];
    /* The branch that leaves last is next to its parent, so that no joint crosses a lane. */
    const below = (parent) => family.map((j, n) => [j, n]).filter(([j]) => rows[j].branch[0] === parent)
      .sort(([a], [b]) => rows[b].branch[1] - rows[a].branch[1])
      .forEach(([j, n]) => { lanes.push([j, n, parent]); below(n); });
    below(null);
    const lane = new Map(lanes.map(([, n], k) => [n, 12 + 18 * k]));
    const width = Math.max(Math.min(detail.clientWidth - 44, 900), 220);
    const x = (token) => 6 + (token / ends) * (width - 66);
    const scored = family.map((j) => rows[j].reward).filter((reward) => reward !== null);
    const [low, high] = [Math.min(...scored), Math.max(...scored)];
    const colour = (reward) => reward === null ? "var(--was)" : low === high ? "var(--c0)"
      : `color-mix(in srgb, var(--good) ${Math.round((100 * (reward - low)) / (high - low))}%, var(--bad))`;
    const height = 18 * lanes.length + 8;
    const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `${family.length} rollouts of one problem and where they part; the buttons above select one` });
    for (const [j, n, parent] of lanes) {
      const [, leaves, starts, stops] = rows[j].branch;
      const y = lane.get(n);
      const style = `stroke:${colour(rows[j].reward)}`;
      const joint = parent === null ? "" : `M${x(leaves)} ${lane.get(parent)}V${y}`;
      picture.append(svg("g", { class: `lane ${j === i ? "current" : ""}`, onclick: () => show(j) },
        svg("title", {}, `${rows[j].role} ${rows[j].index + 1}, reward ${write(rows[j].reward, "number")}, ${rows[j].tokens} tokens` +
          (rows[j].parent === null ? "" : `, after ${rows[j].forkedAt} tokens of ${rows[j].parent}`)),
        svg("rect", { x: 0, y: y - 9, width, height: 18 }),
        svg("path", { class: "given", d: `${joint}M${x(leaves)} ${y}H${x(starts)}` }),
        svg("path", { style, d: `M${x(starts)} ${y}H${x(stops)}` }),
        svg("circle", { cx: x(stops), cy: y, r: 3.5, style: `fill:${colour(rows[j].reward)}` }),
        svg("text", { x: x(stops) + 8, y: y + 4 }, write(rows[j].reward, "number"))));
    }
    return [make("h4", {}, `Tree of ${family.length} rollouts: left to right the tokens after the prompt, at the ends the rewards`),
      make("div", { class: "tree" }, picture)];
  }

  function show(j) {
    if (!shown.includes(j)) { clear(); filter(); }
    select(j);
  }

  /* The advantages of a channel, for every token that is shown; "" is their weighted sum. */
  function advantagesOf(row, channel) {
    const one = (name) => row.perToken.advantages[name] ?? row.perToken.ids.map(() => row.advantages[name][0]);
    if (channel !== "") return one(channel);
    const parts = Object.entries(row.weights).map(([name, weight]) => [weight, one(name)]);
    return row.perToken.ids.map((_, t) => parts.reduce((sum, [weight, values]) => sum + weight * values[t], 0));
  }

  /* The completion as text, or token by token in the colours of an advantage or of the surprise. */
  function completion(row) {
    const channels = Object.keys(row.advantages);
    const views = [["text", "Text"]];
    if (row.perToken.ids.length && Object.keys(report.pieces).length) {
      if (Object.keys(row.weights).length > 1) views.push(["sum", "All channels, weighted"]);
      views.push(...channels.map((name) => [`of ${name}`, channels.length > 1 ? `Advantage, ${name}` : "Advantage"]), ["surprise", "Surprise"]);
    }
    const known = views.map(([key]) => key);
    const chosen = known.includes(view) ? view : known.length > 2 ? known[1] : "text";
    const switches = views.length < 2 ? null : make("p", { class: "views", role: "group", "aria-label": "Colours of the completion" },
      ...views.map(([key, name]) => make("button", { type: "button", "aria-pressed": String(key === chosen),
        onclick: () => { view = key; const top = detail.scrollTop; select(rows.indexOf(row)); detail.scrollTop = top; } }, name)));
    const body = chosen === "text" ? [make("pre", { class: "text completion" }, row.completion || "(empty)")] : coloured(row, chosen);
    return [make("h4", {}, "Completion"), switches, ...body];
  }

  function coloured(row, chosen) {
    const { ids, logprobs, mask, texts } = row.perToken;
    const surprising = chosen === "surprise";
    const channel = chosen === "sum" ? "" : chosen.slice(3);
    const values = surprising ? logprobs.map((value) => (value === null ? 0 : -value)) : advantagesOf(row, channel);
    const peers = surprising ? [values] : rows.filter((other) => other.stage === row.stage && other.step === row.step && (channel === "" ? Object.keys(other.weights).length : channel in other.advantages)).map((other) => advantagesOf(other, channel));
    const most = Math.max(...peers.flat().map(Math.abs), surprising ? 1 : 1e-9);
    const name = surprising ? "−log-prob" : "advantage";
    const spans = ids.map((id, t) => {
      const off = mask !== null && mask[t] === 0;
      const share = Math.round(8 + 62 * Math.min(Math.abs(values[t]) / most, 1));
      const hue = surprising ? "var(--c0)" : values[t] > 0 ? "var(--good)" : "var(--bad)";
      const style = off || values[t] === 0 ? null : `background:color-mix(in srgb, ${hue} ${share}%, transparent)`;
      return make("span", { class: off ? "masked" : "", style, title: `token ${t}: ${off ? "not trained on" : `${name} ${write(values[t], "fine")}`}, log-prob ${write(logprobs[t], "fine")}` },
        texts ? texts[t] : report.pieces[id]);
    });
    const rest = row.tokens > ids.length ? [make("span", { class: "masked" }, ` … ${(row.tokens - ids.length).toLocaleString("en")} more tokens`)] : [];
    const legend = surprising ? `The stronger, the less likely the token was to the policy that sampled it (up to ${write(most, "number")} nats).`
      : `Green tokens are made more likely, red ones less; full strength is ${write(most, "number")}, the largest shown of this step.${mask === null ? "" : " Struck through: not trained on."}`;
    return [make("pre", { class: "text completion coloured" }, ...spans, ...rest), make("p", { class: "legend" }, legend)];
  }

  function badge(name, value, kind = "") {
    return make("span", { class: `badge ${kind}` }, `${name} `, make("b", {}, value));
  }

  function badges(row) {
    const dropped = row.status !== null && !begins(row, "trained") && !begins(row, "unused");
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
        onclick: () => show(j),
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
      [`advantage, ${name}${name in row.weights ? ` × ${write(row.weights[name], "fine")}` : ""}`, low === high ? write(mean, "fine") : `mean ${write(mean, "fine")}, from ${write(low, "fine")} to ${write(high, "fine")}`]);
    return pairs("Rewards and advantages", [...entries, ...errors, ...advantages]);
  }

  function provenance(row) {
    const sampling = row.temperature === null ? [] : [["sampling", `temperature ${row.temperature}, at most ${row.maxTokens.toLocaleString("en")} tokens`]];
    const fork = row.parent === null ? [] : [["fork", `of ${row.parent}, after ${row.forkedAt} tokens`]];
    const versions = Object.entries(row.versions).map(([name, version]) => [`version of ${name}`, version]);
    const masked = row.perToken.mask === null ? [] : [["loss mask", `${row.perToken.mask.filter((kept) => kept).length} of ${row.perToken.mask.length} shown tokens`]];
    const number = row.step === null ? "" : ` --step ${row.step}`;
    return pairs("Where it comes from", [
      ["rollout", row.id], ["example", row.example], ["role", row.role], ["policy version", String(row.version)],
      ["sampling seed", row.seed], ...sampling, ...fork, ["prompt", `${row.promptTokens.toLocaleString("en")} tokens`], ...masked, ...versions,
      ["in full", make("code", {}, `posttrain rollouts show ${report.run} '${row.id}' --stage ${row.stage}${number} --tokens`)],
    ]);
  }

  /* Where the texts of tokens are not known: one bar a token, how surprising it was to the policy. */
  function tokenChart(row) {
    const { ids, logprobs, mask, advantages } = row.perToken;
    if (!ids.length || Object.keys(report.pieces).length) return [];
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
