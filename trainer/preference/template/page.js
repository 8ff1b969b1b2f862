"use strict";
const $ = id => document.getElementById(id);
const study = JSON.parse($("study").textContent);
const ANSWERS = ["left", "same", "right"];
const WORDS = {
  left: '<span class="wide">Left</span><span class="tall">Top</span> better',
  same: "Same",
  right: '<span class="wide">Right</span><span class="tall">Bottom</span> better',
};
const STORE = "apt-preference-" + study.study;
const many = n => `${n} pair${n === 1 ? "" : "s"}`;
const state = load();
let view = "start", at = 0, active = 0, shown = 0, clips = [], addresses = [];
let paused = matchMedia("(prefers-reduced-motion: reduce)").matches;

function load() {
  const fresh = {rater: "", answers: {}, at: 0};
  try {
    const kept = JSON.parse(localStorage.getItem(STORE));
    return kept && typeof kept.answers === "object" ? {...fresh, ...kept} : fresh;
  } catch {
    return fresh;
  }
}

function keep() {
  try {
    localStorage.setItem(STORE, JSON.stringify({...state, at}));
    $("store").textContent = "";
  } catch {
    $("store").textContent = "This browser keeps nothing: answer all in one go, and do not close the page.";
  }
}

const answersOf = index => state.answers[study.pairs[index].pair] ?? {};
const isAnswered = index => study.questions.every(q => answersOf(index)[q.name]);
const answered = () => study.pairs.filter((_, index) => isAnswered(index)).length;

// What is seen.

function go(to) {
  view = to;
  for (const name of ["start", "pair", "end"]) $(name).hidden = name !== to;
  if (to !== "pair") clear();
  const count = answered(), any = Object.keys(state.answers).length > 0;
  $("progress").max = study.pairs.length;
  $("progress").hidden = to === "start";
  $("afresh").hidden = !any;
  if (to === "start") {
    $("where").textContent = "Which one is better?";
    $("rater").value = state.rater;
    $("begin").textContent = any ? "Go on" : "Start";
  }
  if (to === "end") {
    const missing = study.pairs.length - count;
    $("where").textContent = missing ? "Not finished" : "Finished";
    $("thanks").textContent = missing
      ? `${many(missing)} still to answer. The votes so far can be saved, but are not counted by default.`
      : `Thank you, ${state.rater}. Save your votes and send the file to whoever asked you.`;
    $("saved").textContent = "";
  }
  paint();
  $("where").focus({preventScroll: true});
  scrollTo(0, 0);
}

function show(index) {
  at = index;
  const pair = study.pairs[index];
  clear();
  const token = shown;
  clips = [];
  for (const figure of document.querySelectorAll("#samples figure")) {
    const side = figure.dataset.side;
    figure.firstElementChild.replaceChildren(sample(pair, side));
  }
  $("playing").hidden = pair.kind !== "video";
  $("prompt").textContent = `\u201c${pair.prompt}\u201d`;
  active = firstOpen();
  keep();
  go("pair");
  if (clips.length) together(token);
}

function clear() {
  shown += 1;
  for (const clip of clips) { clip.pause(); clip.removeAttribute("src"); clip.load(); }
  clips = [];
  addresses.forEach(URL.revokeObjectURL);
  addresses = [];
}

function sample(pair, side) {
  const element = document.createElement(pair.kind === "video" ? "video" : "img");
  const name = side === "left" ? "left or top" : "right or bottom";
  element.onerror = () => {
    const sorry = document.createElement("p");
    sorry.textContent = "This browser cannot show this sample. Try another one, and tell who sent the page.";
    element.replaceWith(sorry);
  };
  if (pair.kind === "video") {
    Object.assign(element, {muted: true, playsInline: true, preload: "auto"});
    element.setAttribute("aria-label", `The ${name} sample`);
    element.onended = () => { if (clips.every(clip => clip.ended)) restart(shown); };
    clips.push(element);
  } else {
    element.alt = `The ${name} sample`;
  }
  element.src = address(pair[side], pair.kind);
  return element;
}

function address(source, kind) {
  if (!source.startsWith("#")) return source;
  const bytes = Uint8Array.from(atob($(source.slice(1)).textContent), letter => letter.charCodeAt(0));
  const made = URL.createObjectURL(new Blob([bytes], {type: kind === "video" ? "video/mp4" : "image/png"}));
  addresses.push(made);
  return made;
}

// Both clips start when both can, and start again when both have ended.

const once = (element, event) => new Promise(done => element.addEventListener(event, done, {once: true}));

async function together(token) {
  await Promise.all(clips.map(clip => clip.readyState >= 3 ? null : once(clip, "canplay")));
  await restart(token);
}

async function restart(token) {
  if (token !== shown) return;
  clips.forEach(clip => clip.pause());
  await Promise.all(clips.map(clip => {
    if (clip.currentTime === 0) return null;
    const there = once(clip, "seeked");
    clip.currentTime = 0;
    return there;
  }));
  if (token === shown) play();
}

function play() {
  $("pause").textContent = paused ? "Play" : "Pause";
  for (const clip of clips) if (paused) clip.pause(); else if (!clip.ended) clip.play().catch(() => {});
}

// Answers.

const firstOpen = () => Math.max(0, study.questions.findIndex(q => !answersOf(at)[q.name]));

function answer(question, value) {
  const pair = study.pairs[at].pair;
  state.answers[pair] = {...state.answers[pair], [study.questions[question].name]: value};
  active = isAnswered(at) ? question : firstOpen();
  keep();
  paint();
}

function paint() {
  const count = answered();
  $("progress").value = count;
  $("done").textContent = view === "start" ? "" : `${count} of ${study.pairs.length} answered`;
  $("early").hidden = view !== "pair" || !state.rater || count === 0;
  if (view !== "pair") return;
  $("where").textContent = `Pair ${at + 1} of ${study.pairs.length}`;
  const given = answersOf(at);
  document.querySelectorAll("#questions fieldset").forEach((set, index) => {
    set.setAttribute("aria-current", index === active);
    for (const button of set.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", given[set.dataset.name] === button.dataset.value);
    }
  });
  const last = at === study.pairs.length - 1;
  $("forward").setAttribute("aria-disabled", !isAnswered(at));
  $("forward").textContent = last ? "Finish \u2192" : "Forward \u2192";
  $("note").textContent = "";
}

function forward() {
  if (!isAnswered(at)) $("note").textContent = "Answer all three questions to go on.";
  else if (at + 1 < study.pairs.length) show(at + 1);
  else go("end");
}

function back() {
  if (at > 0) show(at - 1);
  else go("start");
}

function resume() {
  const open = study.pairs.findIndex((_, index) => !isAnswered(index));
  if (open < 0) go("end");
  else show(Math.min(state.at, open));
}

function afresh() {
  if (!confirm("This forgets the answers of this rater in this browser. Have the votes been saved?")) return;
  Object.assign(state, {rater: "", answers: {}, at: 0});
  at = 0;
  keep();
  go("start");
}

function download() {
  const votes = study.pairs.map(({pair}) => ({
    pair, ...Object.fromEntries(study.questions.map(q => [q.name, state.answers[pair]?.[q.name] ?? null])),
  }));
  const file = {kind: study.kind, format: study.format, study: study.study, rater: state.rater, votes};
  const link = document.createElement("a");
  const name = state.rater.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "rater";
  link.href = URL.createObjectURL(new Blob([JSON.stringify(file, null, 1)], {type: "application/json"}));
  link.download = `votes-${study.study.slice(0, 6)}-${name}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  $(view === "end" ? "saved" : "note").textContent = `Saved as ${link.download}.`;
}

function build() {
  $("many").textContent = many(study.pairs.length);
  study.questions.forEach((question, index) => {
    const term = document.createElement("dt"), meaning = document.createElement("dd");
    term.textContent = question.title;
    meaning.textContent = question.wording;
    $("explained").append(term, meaning);
    const set = document.createElement("fieldset");
    set.dataset.name = question.name;
    set.innerHTML = "<legend></legend><p></p><div class=answers></div>";
    set.children[0].textContent = question.title;
    set.children[1].textContent = question.wording;
    ANSWERS.forEach((value, place) => {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.value = value;
      button.innerHTML = `<span>${WORDS[value]}</span> <kbd aria-hidden=true>${place + 1}</kbd>`;
      button.onclick = () => answer(index, value);
      set.lastChild.append(button);
    });
    $("questions").append(set);
  });
}

$("start").onsubmit = event => {
  event.preventDefault();
  const name = $("rater").value.trim();
  $("rater").value = name;
  if (!$("start").reportValidity()) return;
  state.rater = name;
  keep();
  resume();
};
$("back").onclick = back;
$("forward").onclick = forward;
$("pause").onclick = () => { paused = !paused; play(); };
$("again").onclick = () => { paused = false; restart(shown); };
$("download").onclick = $("early").onclick = download;
$("review").onclick = () => show(Math.max(0, study.pairs.findIndex((_, index) => !isAnswered(index))));
$("afresh").onclick = $("other").onclick = afresh;
document.addEventListener("keydown", event => {
  if (view !== "pair" || event.ctrlKey || event.altKey || event.metaKey) return;
  const place = "123".indexOf(event.key);
  if (event.key.length === 1 && place >= 0) { if (!event.repeat) answer(active, ANSWERS[place]); }
  else if (event.key === "ArrowRight") { if (!event.repeat) forward(); }
  else if (event.key === "ArrowLeft") { if (!event.repeat) back(); }
  else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    active = (active + (event.key === "ArrowDown" ? 1 : study.questions.length - 1)) % study.questions.length;
    paint();
  }
  else if (event.key === "r" || event.key === "R") $("again").click();
  else if (event.key === " " && event.target.tagName !== "BUTTON") $("pause").click();
  else return;
  event.preventDefault();
});

build();
if (state.rater && Object.keys(state.answers).length) resume();
else go("start");
keep();
