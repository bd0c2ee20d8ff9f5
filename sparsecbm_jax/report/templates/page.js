"use strict";

// Draws the page from the JSON that it holds. Texts enter as text nodes only, never as markup. The live page's script
// uses these functions, too.
const drawing = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const TRACKED_WORDS = 3; // of each concept, while none is followed
  const FOLLOWED_WORDS = 8;
  // Okabe and Ito's palette without black and yellow; it repeats after seven concepts, whose names tell them apart.
  const NUM_COLOURS = 7;
  const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
  let numViews = 0;

  // --- Numbers -------------------------------------------------------------------------------------------------------

  const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
  const brief = (score) => {
    const size = Math.abs(score);
    const digits = size >= 100 ? size.toFixed(0) : size ? size.toPrecision(3) : "0";
    return (score < 0 ? "−" : "") + digits;
  };
  const cut = (text, most) => Array.from(text).length > most ? `${Array.from(text).slice(0, most - 1).join("")}…` : text;
  const count = (n) => n.toLocaleString("en");
  const largest = (numbers) => Math.max(0, ...numbers.map(Math.abs)) || 1;
  /** The shade of a score: by its size where scores are signed and add up, by its square where the squares add up. */
  const shade = (score, strongest, isSigned) => `${Math.round(100 * Math.abs(score / strongest) ** (isSigned ? 1 : 2))}%`;
  const worded = (score, isSigned) => (isSigned && score > 0 ? "+" : "") + brief(score);
  const best = (shares) => Object.keys(shares).reduce((a, b) => (shares[b] > shares[a] ? b : a));

  function softmax(logits) {
    const top = Math.max(...Object.values(logits));
    const raised = Object.entries(logits).map(([name, logit]) => [name, Math.exp(logit - top)]);
    const total = raised.reduce((sum, [, value]) => sum + value, 0);
    return Object.fromEntries(raised.map(([name, value]) => [name, value / total]));
  }

  /** How the words were scored, such as 'integrated_gradients (signed, from zero in 32 steps)'. */
  function methodWords(pathway) {
    const from = pathway.baseline === null ? "" : `, from ${pathway.baseline} in ${pathway.num_steps} steps`;
    return `${pathway.method} (${pathway.is_signed ? "signed" : "no sign"}${from})`;
  }

  const countedFrom = (pathway) => (pathway.reference === "mean" ? ", against the average text and label" : ", counted from zero");

  /** What the label is made of where `chosen` maps concepts to the classes that a person set. */
  function decide(pathway, chosen) {
    const contributions = pathway.concepts.map((lane) =>
      chosen.has(lane.name) ? data.predictor[lane.name][chosen.get(lane.name)] : lane.contributions);
    if (!chosen.size) {
      return { contributions, logits: pathway.label_logits, probabilities: pathway.label_probabilities, label: pathway.label };
    }
    const logits = { ...pathway.base };
    for (const part of contributions) for (const label of Object.keys(logits)) logits[label] += part[label];
    const probabilities = softmax(logits);
    return { contributions, logits, probabilities, label: best(probabilities) };
  }

  // --- Elements ------------------------------------------------------------------------------------------------------

  /** An element; a key that starts with "on" is a listener, one that starts with "--" a style property. */
  function make(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes ?? {})) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (key.startsWith("--")) node.style.setProperty(key, value);
      else if (value !== null && value !== false) node.setAttribute(key, value);
    }
    node.append(...children.flat().filter((child) => child !== null));
    return node;
  }

  const exact = (value, shown, attributes) => make("data", { value, ...attributes }, shown);
  const unseen = (text) => make("span", { class: "unseen" }, text);
  const swatch = (k) => make("span", { class: `swatch colour-${k % NUM_COLOURS}`, "aria-hidden": "true" });

  function path(definition, attributes) {
    const node = document.createElementNS(SVG, "path");
    node.setAttribute("d", definition);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  }

  function table(caption, head, rows) {
    const cell = (content, i) => content instanceof Node && content.nodeName === "TD" ? content
      : make(i ? "td" : "th", i ? {} : { scope: "row" }, content);
    // Above the table and not in it, where it would be as wide as the table and leave a narrow screen.
    return make("div", { class: "table", tabindex: "0", role: "region", "aria-label": caption },
      make("p", { class: "caption", "aria-hidden": "true" }, caption),
      make("table", {}, make("caption", { class: "unseen" }, caption),
        make("thead", {}, make("tr", {}, head.map((name) => make("th", { scope: "col" }, name)))),
        make("tbody", {}, rows.map((row) => make("tr", {}, row.map(cell))))));
  }

  // --- One pathway ---------------------------------------------------------------------------------------------------

  /**
   * The view of a pathway: verdict, four lanes, tables.
   *
   * @param {object} pathway - `DecisionPathway.to_dict()`.
   * @param {object} about - `heading`; `beside`, a pathway to share scales with; `followed` and `explained`, the concept
   *   and the label that are shown first; `report` of an edit: differences from `beside` are marked; and `onset`, which
   *   is called with the concept and the class that a person sets.
   */
  function pathwayView(pathway, { heading = null, beside = null, report = null, followed = null, explained: firstLabel = pathway.explained_label, onset = null } = {}) {
    const id = `view${numViews++}`;
    const lanes = pathway.concepts;
    const strongest = lanes.map((lane, k) => largest([...lane.word_scores, ...(beside?.concepts[k].word_scores ?? [])]));
    const chosen = new Map();
    let shownLabel = firstLabel;
    let pinned = followed;
    let passing = null; // the concept under the pointer or the focus
    let decision = decide(pathway, chosen);

    const reference = report && beside;
    const before = (k) => reference && reference.concepts[k];
    const active = () => passing ?? pinned;

    // The verdict bar.
    const verdict = make("p", { class: "label" });
    const explained = make("p", { class: "explained" });
    const status = make("p", { class: "status", role: "status" });
    const shares = Object.keys(pathway.label_probabilities).map((label) => {
      const bar = make("span", { class: "bar" });
      const number = exact(0, "", { class: "number" });
      const row = make("button", { type: "button", class: "share", onclick: () => showLabel(label) },
        make("span", { class: "name" }, label), bar, number);
      return { label, bar, number, row };
    });

    // The lane of words.
    const characters = Array.from(pathway.text); // offsets count code points, not UTF-16 units
    const words = pathway.words.map((word, i) =>
      make("span", { class: word.is_read ? "word" : "word unread", "data-word": i }, word.text));
    const review = make("p", { class: "review", dir: "auto", tabindex: "0", role: "group", "aria-describedby": `${id}-shading`,
      "aria-label": "Review; the left and right arrow keys step through its words" });
    let reached = 0;
    pathway.words.forEach((word, i) => {
      review.append(characters.slice(reached, word.start).join(""), words[i]);
      reached = word.end;
    });
    review.append(characters.slice(reached).join(""));
    // All are in one place and one of them is visible, so that nothing moves under a passing pointer.
    const isSigned = pathway.is_signed;
    const shadings = [`Underlined: the ${TRACKED_WORDS} words that each concept answers to most${isSigned ? ", dashed where against its class" : ""}.`,
      ...lanes.map((lane) => !lane.shows_words ? `${lane.name} is read as ${lane.predicted_class}: no word is shown for it.` : isSigned ? `Shaded: purple words speak for ${lane.name} = ${lane.explained_class}, orange ones against it.`
        : `Shaded: how strongly ${lane.name} = ${lane.explained_class} answers to each word.`)].map((text) => make("span", {}, text));
    const shading = make("p", { class: "hint shading", id: `${id}-shading` }, shadings);
    const read = make("span", {});
    const scores = lanes.map(() => exact("", "–"));
    const readout = make("div", { class: "readout", role: "status" }, make("p", {}, read),
      lanes.map((lane, k) => make("p", { class: "score" }, swatch(k), make("span", { class: "name" }, lane.name), scores[k])));
    let cursor = null;

    function readWord(i) {
      words[cursor]?.classList.remove("cursor");
      cursor = i;
      words[i]?.classList.add("cursor");
      read.replaceChildren(...(i === null ? ["Point at a word, or use ← and →, for scores."] : ["Scores of ", make("strong", {}, words[i].textContent)]));
      scores.forEach((score, k) => {
        score.value = i === null ? "" : lanes[k].word_scores[i];
        score.textContent = i === null ? "–" : pathway.words[i].is_read ? worded(lanes[k].word_scores[i], isSigned) : "not read";
      });
    }
    readWord(null);

    review.addEventListener("pointerover", (event) => {
      const i = event.target.dataset.word;
      if (i !== undefined) readWord(Number(i));
    });
    review.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || !words.length) return;
      event.preventDefault();
      readWord(cursor === null ? (step > 0 ? 0 : words.length - 1) : (cursor + step + words.length) % words.length);
    });
    review.addEventListener("pointerleave", () => readWord(null));
    review.addEventListener("blur", () => readWord(null));

    // The lanes of subnetworks, concepts and the label; a row of each belongs to a concept.
    const follows = (k) => ({
      "data-concept": k,
      onpointerenter: () => { passing = k; follow(); },
      onpointerleave: () => { passing = null; follow(); },
      onfocusin: () => { passing = k; follow(); },
      onfocusout: () => { passing = null; follow(); },
    });

    const densest = largest(lanes.flatMap((lane) => lane.subnetwork?.density_per_layer ?? []));
    const layersHint = lanes.some((lane) => lane.subnetwork) ? `Weights kept, by layer: ${percent(densest)} at most.` : "None is pruned.";
    const subnetworks = lanes.map((lane, k) => {
      const item = make("li", { class: "card subnetwork", ...follows(k) }, make("p", { class: "title" }, swatch(k), unseen("Subnetwork of "), lane.name));
      const mask = lane.subnetwork;
      if (!mask) item.append(make("p", { class: "small" }, "all weights (dense)"));
      else {
        item.append(make("p", { class: "small" }, exact(mask.density, percent(mask.density)), " kept"));
        const layers = mask.density_per_layer;
        item.append(make("div", { class: "layers", "--layers": layers.length, role: "img", "aria-label": `Kept by layer: ${layers.map((share) => percent(share)).join(", ")}` },
          layers.map((share) => make("span", { "--height": `${(100 * share) / densest}%`, "--colour": CIVIDIS[Math.min(9, Math.floor(10 * share))] }))));
      }
      if (report?.concept === lane.name) {
        item.append(make("p", { class: "small changed" }, `${count(report.num_dropped)} dropped, ${count(report.num_grown)} grown`));
      }
      return item;
    });

    const concepts = lanes.map((lane, k) => {
      const pin = make("button", { type: "button", class: "pin", "aria-pressed": "false", "aria-label": `Follow ${lane.name}`,
        onclick: () => { pinned = pinned === k ? null : k; passing = null; follow(); } }, lane.name);
      const doubts = [...(lane.is_unsure ? ["not sure"] : []), ...(lane.is_guess ? ["read no better than by guessing"] : [])];
      const doubt = doubts.length ? make("span", { class: "doubt" }, doubts.join(", ")) : null;
      const was = before(k) && before(k).predicted_class !== lane.predicted_class
        ? make("span", { class: "changed" }, `changed: was ${before(k).predicted_class}`) : null;
      const classes = Object.entries(lane.probabilities).map(([name, share]) => {
        const isPredicted = name === lane.predicted_class;
        const content = [make("span", { class: "name" }, name), make("span", { class: "bar", "--share": share }), exact(share, percent(share), { class: "number" })];
        const kind = isPredicted ? "class predicted" : "class";
        if (!data.predictor) return make("div", { class: kind, "data-class": name }, content);
        return make("button", { type: "button", class: kind, "data-class": name, "aria-pressed": "false",
          onclick: () => {
            // The class that is read already is how things are.
            if (isPredicted || chosen.get(lane.name) === name) chosen.delete(lane.name);
            else {
              chosen.set(lane.name, name);
              onset?.(lane.name, name);
            }
            update();
          } }, unseen(`Set ${lane.name} to `), content, isPredicted ? unseen(" as the model predicts it") : null);
      });
      return { pin, classes, item: make("li", { class: "card concept", ...follows(k) }, make("p", { class: "title" }, pin, was, doubt), make("div", { class: "classes" }, classes)) };
    });

    const reset = make("button", { type: "button", class: "reset", onclick: () => { chosen.clear(); update(); } }, "Reset");
    const fallRow = (name, attributes) => {
      const bar = make("span", { class: "step", "aria-hidden": "true" });
      const number = exact(0, "", { class: "number" });
      const note = make("span", { class: "note" });
      return { bar, number, note, item: make("li", { class: "fall", ...attributes }, make("span", { class: "name" }, name), make("span", { class: "axis" }, bar), number, note) };
    };
    const falls = [fallRow("base"), ...lanes.map((lane, k) => fallRow(lane.name, follows(k))), fallRow("logit", { class: "fall total" })];
    const sumHint = make("p", { class: "hint" });

    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("class", "links");
    svg.setAttribute("aria-hidden", "true");
    const lane = (name, title, hint, ...content) =>
      make("section", { class: `lane ${name}`, "aria-label": title }, make("h3", {}, title), hint, content);
    const diagram = make("div", { class: "lanes", "--concepts": lanes.length },
      svg,
      lane("words", "Words", shading, review,
        make("div", { class: "below" },
          pathway.is_truncated ? make("p", { class: "small" }, "The text is longer than the model reads: its pale end had no part in the decision.") : null, readout)),
      lane("subnetworks", "Subnetworks", make("p", { class: "hint" }, layersHint), make("ol", {}, subnetworks)),
      lane("concepts", "Concepts", make("div", { class: "hint" }, make("span", {}, "Class probabilities", data.predictor ? make("span", { class: "press" }, "; press to set") : null, "."), data.predictor ? reset : null),
        make("ol", {}, concepts.map(({ item }) => item))),
      lane("outcome", "Label", sumHint, make("ol", {}, falls.map(({ item }) => item))));

    const view = make("article", { class: "pathway" },
      heading ? make("h2", {}, heading) : null,
      make("header", { class: "verdict" }, make("div", {}, verdict, explained, status),
        make("div", { class: "shares", role: "group", "aria-label": "Probability of each label; press one to see what adds up to its logit" }, shares.map(({ row }) => row))),
      diagram, tables(pathway, strongest));

    /** Shows the parts of a label's logit, here and in the pathway next to it, so that both can be compared. */
    function showLabel(label) {
      for (const one of view.parentNode.children) one.dispatchEvent(new CustomEvent("label", { detail: label }));
    }
    view.addEventListener("label", ({ detail }) => { shownLabel = detail; update(); });

    /** Shades and links what belongs to the followed concept. */
    function follow() {
      const k = active();
      view.classList.toggle("following", k !== null);
      for (const node of view.querySelectorAll("[data-concept]")) node.classList.toggle("active", Number(node.dataset.concept) === k);
      concepts.forEach(({ pin }, i) => pin.setAttribute("aria-pressed", String(pinned === i)));
      words.forEach((word, i) => {
        const score = k === null || !lanes[k].shows_words ? 0 : lanes[k].word_scores[i];
        word.style.setProperty("--strength", score === 0 ? "0%" : shade(score, strongest[k], isSigned));
        word.classList.toggle("against", score < 0);
      });
      shadings.forEach((text, i) => text.classList.toggle("absent", i !== (k === null ? 0 : k + 1)));
      drawLinks();
    }

    /** States the label and its parts, with the concepts that are set. */
    function update() {
      decision = decide(pathway, chosen);
      const { probabilities, logits, contributions, label } = decision;
      verdict.replaceChildren(make("span", { class: "eyebrow" }, chosen.size ? "Label, what if" : "Label"),
        make("strong", { class: "decided" }, label), exact(probabilities[label], percent(probabilities[label])));
      if (pathway.is_unsure && !chosen.size) verdict.append(make("span", { class: "doubt" }, "not sure"));
      if (reference && !chosen.size && reference.label !== label) verdict.append(make("span", { class: "changed" }, `changed: was ${reference.label}`));
      explained.textContent = `Explained: label ${shownLabel}` + (shownLabel !== pathway.explained_label ? "" : pathway.target === "predicted" ? " (the predicted one)" : ` (requested: ${pathway.target})`)
        + `; words by ${methodWords(pathway)}`;
      status.textContent = chosen.size
        ? `With ${[...chosen].map(([name, value]) => `${name} = ${value}`).join(", ")} the label is ${label}; the model predicted ${pathway.label} (${percent(pathway.label_probabilities[pathway.label])}).` : "";
      for (const share of shares) {
        share.bar.style.setProperty("--share", probabilities[share.label]);
        share.number.value = probabilities[share.label];
        share.number.textContent = percent(probabilities[share.label]);
        share.row.classList.toggle("predicted", share.label === label);
        share.row.setAttribute("aria-pressed", String(share.label === shownLabel));
      }
      concepts.forEach(({ classes }, k) => classes.forEach((row) => {
        const isSet = chosen.get(lanes[k].name) === row.dataset.class;
        if (row.nodeName === "BUTTON") row.setAttribute("aria-pressed", String(isSet));
      }));
      reset.disabled = !chosen.size;
      sumHint.textContent = `Base and contributions sum to the logit of label ${shownLabel}${countedFrom(pathway)}.`;
      updateWaterfall(contributions.map((part) => part[shownLabel]), logits[shownLabel]);
      follow();
    }

    function updateWaterfall(contributions, logit) {
      const steps = [pathway.base[shownLabel], ...contributions];
      const sums = (terms) => terms.reduce((ends, term) => [...ends, ends.at(-1) + term], [0]);
      const ends = sums(steps);
      const scale = beside ? [...ends, ...sums([beside.base[shownLabel], ...beside.concepts.map((lane) => lane.contributions[shownLabel])])] : ends;
      const low = Math.min(...scale), width = Math.max(...scale) - low || 1;
      falls.forEach(({ item, bar, number, note }, i) => {
        const isTotal = i === steps.length;
        const [from, to, value] = isTotal ? [0, logit, logit] : [ends[i], ends[i + 1], steps[i]];
        item.style.setProperty("--from", (Math.min(from, to) - low) / width);
        item.style.setProperty("--size", Math.abs(to - from) / width);
        item.style.setProperty("--zero", -low / width);
        item.style.setProperty("--end", (to - low) / width);
        bar.className = value < 0 ? "step against" : "step";
        number.value = value;
        number.textContent = signed(value);
        if (isTotal) note.textContent = `probability ${percent(decision.probabilities[shownLabel])}`;
        else if (i) {
          const own = lanes[i - 1].contributions[shownLabel], old = before(i - 1)?.contributions[shownLabel];
          note.textContent = chosen.has(lanes[i - 1].name) ? `set; was ${signed(own)}`
            : old !== undefined && signed(old) !== signed(own) ? `was ${signed(old)}` : "";
        }
      });
    }

    function drawLinks() {
      const frame = diagram.getBoundingClientRect();
      if (!frame.width) return;
      svg.setAttribute("viewBox", `0 0 ${frame.width} ${frame.height}`);
      const at = (rect) => ({ left: rect.left - frame.left, right: rect.right - frame.left, top: rect.top - frame.top,
        bottom: rect.bottom - frame.top, middle: (rect.top + rect.bottom) / 2 - frame.top });
      const place = (node) => at(node.getBoundingClientRect());
      const stacked = getComputedStyle(diagram).getPropertyValue("--stacked").trim() === "1";
      const text = place(review);
      const slot = Math.min(3, 18 / lanes.length);
      const k = active();
      const curve = (x, y, toX, toY) => `C ${(x + toX) / 2} ${y} ${(x + toX) / 2} ${toY} ${toX} ${toY}`;
      const bend = (gutter, y, toX, toY) => {
        const radius = Math.min(6, Math.abs(toY - y) / 2), down = Math.sign(toY - y) * radius, out = Math.sign(toX - gutter) * radius;
        return `H ${gutter + out} Q ${gutter} ${y} ${gutter} ${y + down} V ${toY - down} Q ${gutter} ${toY} ${gutter + out} ${toY} H ${toX}`;
      };
      const links = [];
      lanes.forEach((lane, j) => {
        const style = (width, kind) => ({ class: `${kind} colour-${j % NUM_COLOURS}${j === k ? " on" : ""}`, "stroke-width": width.toFixed(2) });
        const mask = place(subnetworks[j]), concept = place(concepts[j].item), fall = place(falls[j + 1].item);
        const ranked = (lane.shows_words ? lane.word_scores : []).map((score, i) => [Math.abs(score) / strongest[j], i]).filter(([score]) => score > 0).sort((a, b) => b[0] - a[0]);
        for (const [score, i] of ranked.slice(0, j === k ? FOLLOWED_WORDS : TRACKED_WORDS)) {
          const rects = words[i].getClientRects();
          const word = at(rects[rects.length - 1]);
          const y = word.bottom + 2 + slot * j;
          const edge = text.right + 4;
          links.push(path(stacked ? `M ${word.left} ${y} ${bend(text.left - 8 - slot * j, y, mask.left, mask.middle)}`
            : `M ${word.right} ${y} H ${edge} ${curve(edge, y, mask.left, mask.middle)}`, style(1.25, "carrier")),
          path(`M ${word.left} ${y} H ${word.right}`, style(1 + 1.5 * score, lane.word_scores[i] < 0 ? "link against" : "link")));
        }
        links.push(path(`M ${mask.right} ${mask.middle} ${curve(mask.right, mask.middle, concept.left, mask.middle)}`, style(2, "link")));
        const weight = Math.abs(decision.contributions[j][shownLabel]) / largest(decision.contributions.map((part) => part[shownLabel]));
        links.push(path(stacked ? `M ${concept.right} ${concept.middle} ${bend(concept.right + 6 + slot * j, concept.middle, fall.right, fall.middle)}`
          : `M ${concept.right} ${concept.middle} ${curve(concept.right, concept.middle, fall.left, fall.middle)}`, style(0.75 + 3 * weight, "link")));
      });
      falls.slice(0, -1).forEach(({ item, bar }, i) => {
        const axis = place(bar.parentNode), next = place(falls[i + 1].bar), x = axis.left + Number(item.style.getPropertyValue("--end")) * (axis.right - axis.left);
        links.push(path(`M ${x} ${place(bar).bottom} V ${next.top}`, { class: "riser" }));
      });
      const total = place(falls.at(-1).bar.parentNode), zero = total.left + Number(falls[0].item.style.getPropertyValue("--zero")) * (total.right - total.left);
      links.push(path(`M ${zero} ${place(falls[0].item).top} V ${total.bottom}`, { class: "zero" }));
      svg.replaceChildren(...links);
    }

    new ResizeObserver(drawLinks).observe(diagram);
    diagram.addEventListener("redraw", drawLinks);
    update();
    return view;
  }

  /** The same in numbers, for those who cannot see the drawing or prefer numbers. */
  function tables(pathway, strongest) {
    const lanes = pathway.concepts, labels = Object.keys(pathway.label_logits), classes = Object.keys(lanes[0].probabilities);
    const hasBaseline = pathway.baseline !== null;
    const parts = [
      table("Concepts as the model predicts them", ["Concept", "Class", ...classes.map((name) => `P(${name})`), ...classes.map((name) => `a(${name})`)],
        lanes.map((lane) => [lane.name, lane.predicted_class, ...classes.map((name) => percent(lane.probabilities[name])),
          ...classes.map((name) => lane.activations[name].toFixed(3))])),
      table(`Logits that the words are scored for, by ${methodWords(pathway)}`, ["Concept", "Explained", "Its logit", ...(hasBaseline ? [`Logit at ${pathway.baseline}`, "Sum of words"] : [])],
        lanes.map((lane) => [lane.name, lane.explained_class, ...[lane.explained_logit, ...(hasBaseline ? [lane.baseline_logit, lane.word_scores.reduce((sum, score) => sum + score, 0)] : [])].map(signed)])),
      table(`Parts of each label’s logit${countedFrom(pathway)}`,
        ["Label", "Base", ...lanes.map((lane) => lane.name), "Logit", "Probability"],
        labels.map((label) => [label, signed(pathway.base[label]), ...lanes.map((lane) => signed(lane.contributions[label])),
          signed(pathway.label_logits[label]), percent(pathway.label_probabilities[label])])),
      table(`Why label ${pathway.explained_label}${pathway.foil === pathway.explained_label ? "" : ` and not ${pathway.foil}`}`, ["", ...lanes.map((lane) => lane.name)],
        [["Adds more to it by", ...lanes.map((lane) => signed(lane.contrast))],
          ...(pathway.expected_label === null ? [] : [[`Moves the expected label, ${pathway.expected_label.toFixed(2)}, by`, ...lanes.map((lane) => signed(lane.effect))]])]),
      table("Score of each word", ["Word", ...lanes.map((lane) => `${lane.name} = ${lane.explained_class}`)],
        pathway.words.map((word, i) => [word.text, ...lanes.map((lane, k) => {
          const score = lane.word_scores[i];
          return make("td", { class: score < 0 ? "shaded against" : "shaded", "--strength": shade(score, strongest[k], pathway.is_signed) },
            word.is_read ? worded(score, pathway.is_signed) : "not read");
        })])),
    ];
    const masks = lanes.filter((lane) => lane.subnetwork);
    if (masks.length) {
      const layers = masks[0].subnetwork.density_per_layer;
      parts.push(table("Share of weights that each subnetwork keeps", ["Concept", "All", ...layers.map((_, n) => `Layer ${n + 1}`)],
        masks.map(({ name, subnetwork }) => [name, percent(subnetwork.density), ...subnetwork.density_per_layer.map((share) => percent(share))])));
      parts.push(table("Overlap of subnetworks (Jaccard index; in brackets by chance), and their parts in common", ["Concept", ...masks.map((lane) => lane.name), "Kept by it alone", "Kept by all"],
        masks.map(({ name, subnetwork }) => [name, ...masks.map((lane) => (lane.name === name ? ""
          : `${brief(subnetwork.overlap[lane.name])} (${brief(subnetwork.chance_overlaps[lane.name])})`)), percent(subnetwork.exclusive), percent(subnetwork.shared)])));
    }
    return make("details", { class: "tables" }, make("summary", {}, "All numbers as tables"), parts);
  }

  // --- One correction ------------------------------------------------------------------------------------------------

  /** The kernels and layers that an edit changed: a table whose shades make it a picture. */
  function changeView({ concept, kernels }) {
    const numLayers = Math.max(1, ...kernels.map((kernel) => kernel.dropped.length));
    const most = largest(kernels.flatMap(({ dropped, grown }) => dropped.map((n, layer) => n + grown[layer])));
    const cell = (dropped, grown, rows) => make("td", { class: "shaded", "--strength": `${Math.round(100 * (dropped + grown) / most)}%` },
      dropped + grown ? `−${count(dropped)} +${count(grown)}, ${count(rows)} ${rows === 1 ? "row" : "rows"}` : "–");
    return table(`Where the mask of ${concept} changed: weights dropped (−) and grown (+), and in how many rows, by kernel and layer`,
      ["Kernel", ...Array.from({ length: numLayers }, (_, n) => `Layer ${n + 1}`)],
      kernels.map(({ path, dropped, grown, rows }) => [path.replace(/^layers\/|\/kernel$/g, "").replace(/[/_]/g, " "),
        ...dropped.map((n, layer) => cell(n, grown[layer], rows[layer]))]));
  }

  function correctionView({ report, before, after, change = null }) {
    const outcome = !report.is_repaired ? "not repaired" : report.before.concepts[report.concept] === report.target ? "was correct before" : "repaired";
    const followed = before.concepts.findIndex((lane) => lane.name === report.concept);
    const { name, settings } = report.editor;
    const way = name === "continual" ? "with earlier corrections retained" : `by the editor “${name.replace(/_/g, " ")}”${
      settings.saliency ? `, ranked by ${settings.saliency} saliency` : ""}${settings.num_steps > 1 ? ` in ${settings.num_steps} steps` : ""}`;
    const rows = before.concepts.map(({ name }) => [name, report.before.concepts[name], report.before.concept_probabilities[name], report.after.concepts[name], report.after.concept_probabilities[name]]);
    rows.push(["label", report.before.label, report.before.label_probabilities, report.after.label, report.after.label_probabilities]);
    return make("div", { class: "correction" },
      make("section", { class: "verdict edit", "aria-label": "The edit" },
        make("div", {},
          make("p", { class: "label" }, make("span", { class: "eyebrow" }, `Asked: ${report.concept} = ${report.target}${report.label ? `, label = ${report.label}` : ""}`), make("strong", {}, outcome)),
          make("p", { class: "explained" }, exact(report.num_dropped, count(report.num_dropped)), " weights dropped from the mask of ", report.concept, " and ", exact(report.num_grown, count(report.num_grown)), " grown: ",
            exact(report.changed_share, percent(report.changed_share, 4)), ` of the backbone’s ${count(report.num_weights)}, ${way}. No parameter changed.`)),
        table("Before and after", ["", "Before", "After", "Changed"], rows.map(([name, old, oldShares, now, nowShares]) =>
          [name, `${old} (${percent(oldShares[old])})`, `${now} (${percent(nowShares[now])})`, old === now ? "no" : make("strong", {}, "yes")]))),
      change && change.kernels.length ? changeView(change) : null,
      make("div", { class: "pair" },
        pathwayView(before, { heading: "Before", followed, explained: after.explained_label, beside: after }),
        pathwayView(after, { heading: "After", followed, beside: before, report })));
  }

  // --- The page ------------------------------------------------------------------------------------------------------

  const views = [
    ...data.corrections.map((one) => ({ name: `${one.report.concept} corrected: ${one.report.text}`, render: () => correctionView(one) })),
    ...data.pathways.map((one) => ({ name: `label ${one.label}: ${one.text}`, render: () => pathwayView(one) })),
  ];
  const main = document.getElementById("main");
  const place = make("div", { class: "place" });
  if (views.length > 1) {
    const choice = make("select", { id: "choice", onchange: () => place.replaceChildren(views[choice.selectedIndex].render()) },
      views.map(({ name }, n) => make("option", {}, `${n + 1}. ${cut(name, 80)}`)));
    main.append(make("p", { class: "chooser" }, make("label", { for: "choice" }, `One of ${views.length}`), " ", choice));
  }
  main.append(place);
  if (views.length) place.append(views[0].render());

  // Nothing can be opened on paper, and links are drawn before the browser lays the pages out: the class gives the
  // document the width of paper in advance.
  let opened = [];
  const redraw = () => document.querySelectorAll(".lanes").forEach((diagram) => diagram.dispatchEvent(new Event("redraw")));
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const node of opened) node.open = true;
    document.documentElement.classList.add("printing");
    redraw();
  });
  addEventListener("afterprint", () => {
    for (const node of opened) node.open = false;
    document.documentElement.classList.remove("printing");
    redraw();
  });

  return { data, main, place, count, exact, make, percent, table, correctionView, pathwayView };
})();
