// The gallery of a report: cards are made as they come near the view, and texts are never set as HTML.
const AT_A_TIME = 60;
const page = JSON.parse(document.getElementById("data").textContent);
const [gridRows, gridColumns] = page.grid;
const gallery = document.getElementById("gallery");
const end = document.getElementById("end");
const order = document.getElementById("order");
const status = document.getElementById("status");
const find = document.getElementById("find");
const cardOf = new WeakMap(); // element -> its card

for (const card of page.cards) {
  card.searched = [card.id, card.caption, card.reason, card.message]
    .filter(Boolean).join("\n").toLowerCase();
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function percent(share) {
  return `${share >= 0.1 ? (100 * share).toFixed(0) : Number((100 * share).toPrecision(2))} %`;
}

const byName = (one, other) => (one.id < other.id ? -1 : one.id > other.id ? 1 : 0);

// Cards without a number come last.
function byNumber(numberOf, sign) {
  return (one, other) => {
    const [first, second] = [numberOf(one), numberOf(other)];
    if (first == null || second == null) return (first == null) - (second == null);
    return sign * (first - second) || byName(one, other);
  };
}

const ORDERS = {
  name: byName,
  unsure: byNumber((card) => card.confidence, 1),
  sure: byNumber((card) => card.confidence, -1),
  worst: byNumber((card) => card.scores?.cider_d, 1),
  best: byNumber((card) => card.scores?.cider_d, -1),
};

const STATUSES = {
  all: () => true,
  captioned: (card) => !card.failed,
  failed: (card) => card.failed,
  noted: (card) => !card.failed && Boolean(card.reason || card.problem || card.cut),
};

let chosen = [];
let made = 0;

function choose() {
  clear();
  const text = find.value.trim().toLowerCase();
  const wanted = STATUSES[status.value];
  chosen = page.cards.filter((card) => wanted(card) && card.searched.includes(text));
  if (order.value in ORDERS) chosen.sort(ORDERS[order.value]);
  made = 0;
  gallery.replaceChildren();
  makeMore();
  const all = page.cards.length.toLocaleString("en");
  document.getElementById("count").textContent =
    `${chosen.length.toLocaleString("en")} of ${all} photos`;
}

function makeMore() {
  const cards = chosen.slice(made, made + AT_A_TIME).map(cardElement);
  made += cards.length;
  gallery.append(...cards);
  cards.forEach((card) => nearView.observe(card));
  // Observe again, since only changes are reported: the end may still be near.
  nearEnd.unobserve(end);
  if (made < chosen.length) nearEnd.observe(end);
}

const nearEnd = new IntersectionObserver(
  (entries) => { if (entries.some((entry) => entry.isIntersecting)) makeMore(); },
  { rootMargin: "1500px" },
);

const nearView = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      nearView.unobserve(target);
      const image = target.querySelector("img");
      if (image) image.src = "data:image/webp;base64," + cardOf.get(target).photo;
    }
  },
  { rootMargin: "800px" },
);

function cardElement(card) {
  const made = element("article", "card");
  cardOf.set(made, card);
  if (page.photos && !card.failed) made.append(frame(card));
  if (card.caption !== null) {
    made.append(caption(card));
    made.append(element("p", "said", aboutCaption(card)));
  }
  if (card.reason) made.append(remark(card));
  made.append(about(card));
  return made;
}

function frame(card) {
  const made = element("div", "frame");
  if (card.photo) {
    const photo = element("div", "photo");
    const image = element("img");
    [image.width, image.height] = card.size;
    image.alt = "";
    photo.append(image);
    made.append(photo);
  } else {
    made.append(element("p", "problem", card.problem));
  }
  return made;
}

function remark(card) {
  const made = element("p", "remark");
  made.append(element("strong", "", card.failed ? "No caption" : "Captioned in part"), ": ");
  made.append(element("bdi", "", `${card.reason}. ${card.message ?? ""}`));
  return made;
}

// Words are located in the caption, which keeps the spaces between Latin words.
function caption(card) {
  const made = element("p", "caption");
  made.lang = "zh-Hans";
  made.setAttribute("role", "group");
  made.setAttribute("aria-label", card.caption);
  const text = element("bdi");
  let from = 0;
  card.words.forEach((word, index) => {
    const at = card.caption.indexOf(word, from);
    if (at < 0 || !word) return;
    text.append(card.caption.slice(from, at), wordElement(card, index));
    from = at + word.length;
  });
  text.append(card.caption.slice(from));
  made.append(text);
  const first = made.querySelector(".word");
  if (first) first.tabIndex = 0;
  return made;
}

function wordElement(card, index) {
  const probability = card.probabilities[index];
  const made = element("span", "word " + level(probability), card.words[index]);
  made.tabIndex = -1; // except the first: Tab moves between captions, arrow keys within one
  made.setAttribute("role", "button");
  made.setAttribute("aria-pressed", "false");
  made.dataset.index = index;
  made.title = aboutWord(card, index);
  made.setAttribute("aria-label", `${card.words[index]}: ${made.title}`);
  return made;
}

function level(probability) {
  if (probability == null || probability >= 0.5) return "level0";
  return probability >= 0.25 ? "level1" : probability >= 0.1 ? "level2" : "level3";
}

function aboutWord(card, index) {
  const said = [];
  const probability = card.probabilities[index];
  if (probability != null) said.push(`probability ${percent(probability)}`);
  const look = card.looks[index];
  if (look) {
    const [, , row, column, weight] = look;
    said.push(`looked most at row ${row + 1}, column ${column + 1} (${percent(weight)})`);
  }
  return said.join("; ");
}

function aboutCaption(card) {
  const said = card.confidence == null ? "" : `${percent(card.confidence)} a word, geometric mean`;
  return card.cut ? `${said}; cut at the length limit` : said;
}

function about(card) {
  const made = element("div", "about");
  if (card.scores) {
    const scores = element("p", "scores");
    for (const [name, value] of Object.entries(card.scores)) {
      if (value === null) continue;
      scores.append(element("span", "", `${page.metrics[name] ?? name} ${value.toFixed(1)}`), " ");
    }
    made.append(scores);
  }
  if (card.references?.length) {
    const references = element("details", "references");
    const count = card.references.length;
    references.append(element("summary", "", count === 1 ? "1 reference" : `${count} references`));
    const list = element("ul");
    list.lang = "zh-Hans";
    for (const reference of card.references) {
      const item = element("li");
      item.append(element("bdi", "", reference));
      list.append(item);
    }
    references.append(list);
    made.append(references);
  }
  const name = element("p", "name");
  name.append(element("bdi", "", card.id));
  made.append(name);
  return made;
}

const map = element("canvas", "map");
const peak = element("div", "peak");
const centre = element("div", "centre");
let shown = null;

function show(word) {
  if (word === shown) return;
  clear();
  shown = word;
  const place = word.closest(".card");
  const card = cardOf.get(place);
  const index = Number(word.dataset.index);
  word.classList.add("shown");
  word.setAttribute("aria-pressed", "true");
  const said = place.querySelector(".said");
  said.replaceChildren(element("bdi", "", card.words[index]), ` ${word.title}`);
  const photo = place.querySelector(".photo");
  if (photo) drawLook(photo, card, index);
}

function clear() {
  if (!shown) return;
  shown.classList.remove("shown");
  shown.setAttribute("aria-pressed", "false");
  const place = shown.closest(".card");
  place.querySelector(".said").textContent = aboutCaption(cardOf.get(place));
  for (const part of [map, peak, centre]) part.remove();
  shown = null;
}

function drawLook(photo, card, index) {
  if (card.maps) {
    drawMap(atob(card.maps), index);
    photo.append(map);
  }
  const look = card.looks[index];
  if (!look) return;
  const [row, column, peakRow, peakColumn] = look;
  placeAt(peak, peakRow, peakColumn);
  peak.style.width = `${100 / gridColumns}%`;
  peak.style.height = `${100 / gridRows}%`;
  photo.append(peak);
  if (!card.maps) { // the map shows more than its centre
    placeAt(centre, row + 0.5, column + 0.5);
    photo.append(centre);
  }
}

function placeAt(part, row, column) {
  part.style.top = `${(100 * row) / gridRows}%`;
  part.style.left = `${(100 * column) / gridColumns}%`;
}

// A veil that is clear over the strongest cell.
function drawMap(bytes, index) {
  map.width = gridColumns;
  map.height = gridRows;
  const context = map.getContext("2d");
  const image = context.createImageData(gridColumns, gridRows);
  const cells = gridRows * gridColumns;
  for (let cell = 0; cell < cells; cell++) {
    image.data[4 * cell + 3] = 0.85 * (255 - bytes.charCodeAt(index * cells + cell));
  }
  context.putImageData(image, 0, 0);
}

const wordAt = (event) => event.target.closest(".word");

function focusWord(word) {
  for (const other of word.closest(".caption").querySelectorAll(".word[tabindex='0']")) {
    other.tabIndex = -1;
  }
  word.tabIndex = 0;
  word.focus();
  show(word);
}

// Not pointer events: a tap would end the hover at once; it sends mouse events too.
gallery.addEventListener("mouseover", (event) => { if (wordAt(event)) show(wordAt(event)); });
gallery.addEventListener("mouseout", (event) => {
  if (!wordAt(event)) return;
  const focused = document.activeElement.closest?.(".word");
  if (focused) show(focused);
  else clear();
});
gallery.addEventListener("focusin", (event) => { if (wordAt(event)) show(wordAt(event)); });
gallery.addEventListener("focusout", (event) => { if (wordAt(event)) clear(); });
gallery.addEventListener("click", (event) => { if (wordAt(event)) focusWord(wordAt(event)); });
gallery.addEventListener("keydown", (event) => {
  const word = wordAt(event);
  if (!word) return;
  const words = [...word.closest(".caption").querySelectorAll(".word")];
  const at = words.indexOf(word);
  const goals = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: words.length - 1 };
  if (event.key in goals) {
    event.preventDefault();
    const goal = words[goals[event.key]];
    if (goal) focusWord(goal);
  } else if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    show(word);
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") clear(); });

const controls = document.getElementById("controls");
controls.addEventListener("submit", (event) => event.preventDefault());
for (const control of [order, status]) control.addEventListener("change", choose);
find.addEventListener("input", choose);
controls.hidden = false;
choose();
