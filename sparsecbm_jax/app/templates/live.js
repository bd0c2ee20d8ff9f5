
// The live page: asks the server for pathways and corrections, and shows them as the static page does. Texts enter as
// text nodes only here, too.
(() => {
  const { data, main, place, count, exact, make, percent, table, correctionView, pathwayView } = drawing;
  let shown = null; // the text whose pathway, or preview, is in place
  let isBusy = false;

  // --- The server ----------------------------------------------------------------------------------------------------

  /** The server's answer; its error messages become errors with the field that was wrong. */
  async function ask(path, form) {
    const options = form === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(form) };
    let response;
    try {
      response = await fetch(path, options);
    } catch {
      throw new Error("The server does not answer. Is it still running?");
    }
    const answer = await response.json();
    if (response.ok) return answer;
    const wait = response.headers.get("Retry-After");
    throw Object.assign(new Error(answer.message + (wait ? ` (in ${wait} s)` : "")), { field: answer.field });
  }

  /** Runs one piece of work at a time and shows its result; `work` returns the words. */
  async function run(doing, work) {
    if (isBusy) return;
    isBusy = true;
    main.setAttribute("aria-busy", "true");
    problem.textContent = "";
    status.textContent = `${doing} …`;
    for (const field of Object.values(fields)) field.removeAttribute("aria-invalid");
    try {
      status.textContent = await work();
    } catch (error) {
      status.textContent = "";
      problem.textContent = error.message;
      fields[error.field]?.setAttribute("aria-invalid", "true");
      fields[error.field]?.focus();
    }
    main.removeAttribute("aria-busy");
    isBusy = false;
  }

  // --- The forms -----------------------------------------------------------------------------------------------------

  const options = (names) => names.map((name) => make("option", {}, name));
  const fields = {
    text: make("textarea", { id: "text", rows: "3", required: "", maxlength: data.max_text, dir: "auto", spellcheck: "false",
      onkeydown: (event) => {
        if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
        event.preventDefault();
        asking.requestSubmit();
      } }),
    concept: make("select", { id: "concept" }, options(data.concepts)),
    target: make("select", { id: "target" }, options(data.classes)),
  };
  const submits = (attributes, work, ...content) => make("form", { ...attributes, onsubmit: (event) => {
    event.preventDefault();
    work();
  } }, content);

  const asking = submits({ class: "asking" }, () => run("Explaining", async () => {
    await explain(fields.text.value);
    return "";
  }), make("label", { for: "text" }, "Text"), fields.text,
  make("button", { class: "main" }, "Explain"), make("span", { class: "small" }, "or Ctrl + Enter"));

  const correcting = submits({ class: "correcting", hidden: "" }, preview,
    make("label", { for: "concept" }, "Correct"), fields.concept, make("label", { for: "target" }, "to"), fields.target,
    make("button", {}, "Preview"), make("span", { class: "small" }, "Nothing changes before it is applied."));

  const status = make("p", { class: "status", role: "status" });
  const problem = make("p", { class: "problem", role: "alert" });
  const active = make("section", { class: "active-edits", "aria-label": "Active corrections" });

  async function explain(text) {
    const pathway = await ask("/api/explain", { text });
    shown = text;
    correcting.hidden = fields.text.value !== text;
    place.replaceChildren(pathwayView(pathway, { onset: (concept, target) => {
      fields.concept.value = concept;
      fields.target.value = target;
    } }));
  }

  // --- A correction --------------------------------------------------------------------------------------------------

  function preview() {
    const form = { text: shown, concept: fields.concept.value, target: fields.target.value };
    run(data.keeps_earlier ? "Looking for an edit, which takes longest for a concept’s first" : "Looking for an edit", async () => {
      const found = await ask("/api/preview", form);
      const { report } = found;
      if (found.edit === null) {
        return report.is_repaired ? `${report.concept} is predicted as ${report.target} already: nothing would change.`
          : `No edit was found that makes the model predict ${report.concept} as ${report.target}${
            data.keeps_earlier ? " and retains its other predictions" : ""}: nothing would change.`;
      }
      const heading = make("h2", { tabindex: "-1" }, "Preview: nothing is changed yet");
      const apply = make("button", { type: "button", class: "main", onclick: () => applied({ ...form, edit: found.edit }) }, "Apply");
      const back = make("button", { type: "button", onclick: () => run("Explaining", async () => {
        await explain(shown);
        return "";
      }) }, "Back");
      place.replaceChildren(make("section", { class: "preview", "aria-label": "Preview" }, heading, impactView(found),
        make("p", { class: "choice" }, apply, back)), correctionView(found));
      heading.focus();
      return "";
    });
  }

  const applied = (form) => run("Applying", async () => {
    const { edit, edits } = await ask("/api/apply", form);
    list(edits);
    await explain(shown);
    fields.concept.focus();
    return `Applied: edit ${edit} is active and in the log.`;
  });

  const undo = ({ id, concept, target }) => run("Undoing", async () => {
    const { edits } = await ask("/api/undo", { edit: id });
    list(edits);
    if (shown !== null) await explain(shown);
    (active.querySelector("button") ?? fields.text).focus();
    return `Undone: edit ${id}, ${concept} to ${target}.`;
  });

  /** The effect of an edit on other texts. */
  function impactView({ report, sample }) {
    const { concept } = report;
    if (sample === null) return make("p", {}, "The server has no texts to try the correction on: see its effect on this text below.");
    const all = sample.num_texts;
    const of = (n) => [exact(n, count(n)), ` of ${count(all)} `, make("span", { class: "small" }, `(${percent(n / all)})`)];
    const flips = Object.entries(sample.flips).flatMap(([was, by]) =>
      Object.entries(by).filter(([, n]) => n).map(([now, n]) => `${was} to ${now}: ${count(n)}`));
    const rows = [
      [`${concept} is predicted differently`, make("td", {}, of(sample.num_changed)), flips.join("; ")],
      [`${concept} is correct only after the edit`, make("td", {}, of(sample.num_repaired)), "by the texts’ own labels"],
      [`${concept} was correct only before the edit`, make("td", {}, of(sample.num_broken)), "by the texts’ own labels"],
      ["The label is predicted differently", make("td", {}, of(sample.num_labels_changed)), ""],
      ["Another concept is predicted differently", make("td", {}, of(0)), "other subnetworks do not change"],
      [`Mean shift of ${concept}’s probabilities`, make("td", {}, exact(sample.shift, percent(sample.shift, 2))), "total variation"],
    ];
    return make("div", {},
      table(`Effect on ${count(all)} held-out texts`, ["", "Texts", "Note"], rows),
      sample.changed_texts.length ? make("details", {}, make("summary", {}, sample.changed_texts.length < sample.num_changed
        ? `The first ${sample.changed_texts.length} texts that are predicted differently` : "The texts that are predicted differently"),
      make("ol", { class: "changed-texts" }, sample.changed_texts.map((text) => make("li", { dir: "auto" }, text)))) : null);
  }

  function list(edits) {
    active.replaceChildren(make("h2", {}, "Active corrections"));
    if (!edits.length) {
      active.append(make("p", { class: "small" }, "None: the model predicts as it was saved."));
      return;
    }
    active.append(table("All edits, oldest first", ["Concept", "Corrected to", "", "", "Was", "Weights changed", "Edit"], edits.map((edit) => [
      edit.concept, edit.target,
      make("button", { type: "button", "aria-label": `Undo edit ${edit.id}`, onclick: () => undo(edit) }, "Undo"),
      make("a", { href: `/api/edits/${edit.id}`, download: `edit-${edit.id}.json`, "aria-label": `Download edit ${edit.id}` }, "Download"),
      edit.was, exact(edit.num_dropped + edit.num_grown, count(edit.num_dropped + edit.num_grown)), make("code", {}, edit.id),
    ])));
  }

  fields.text.addEventListener("input", () => {
    const isOther = shown !== null && fields.text.value !== shown;
    correcting.hidden = shown === null || isOther;
    status.textContent = isOther ? "The pathway below is of the text as it was: press Explain for the text as it is now." : "";
  });

  main.prepend(asking, correcting, status, problem);
  main.append(active);
  fields.text.focus();
  run("Reading the log of edits", async () => {
    list((await ask("/api/edits")).edits);
    return "";
  });
})();
