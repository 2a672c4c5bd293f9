"use strict";
document.documentElement.classList.add("js");

// Tables: a heading sorts its column, within each body (controls stay below arms). Missing values are last.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const numeric = head.classList.contains("n");
    for (const body of table.tBodies) {
      const rows = [...body.rows].sort((a, b) => {
        const x = a.cells[column].dataset.key, y = b.cells[column].dataset.key;
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = numeric ? Number(x) - Number(y) : x.localeCompare(y);
        return down ? -order : order;
      });
      body.append(...rows);
    }
  }));
}

// Audio: one clip plays at a time. Another clip of the same pair continues at the same position.
const clips = [...document.querySelectorAll(".clip:not(.absent)")];
const transport = document.querySelector("#transport");
if (transport && clips.length) {
  const toggle = document.querySelector("#toggle"), now = document.querySelector("#now");
  const time = document.querySelector("#time"), loop = document.querySelector("#loop");
  let current = null, before = null;
  const sound = (clip) => clip.querySelector("audio");
  const pair = (clip) => clip.closest(".pair");
  const draw = () => {
    for (const clip of clips) {
      const playing = clip === current && !sound(clip).paused;
      clip.classList.toggle("on", clip === current);
      clip.querySelector("button").setAttribute("aria-pressed", String(playing));
    }
    if (!current) return;
    const audio = sound(current), length = audio.duration || 1;
    const width = current.querySelector("img").clientWidth;
    current.querySelector(".head").style.transform = `translateX(${(audio.currentTime / length) * (width - 2)}px)`;
    time.textContent = `${audio.currentTime.toFixed(1)} / ${length.toFixed(1)} s`;
    toggle.textContent = audio.paused ? "▶" : "❚❚";
    if (!audio.paused) requestAnimationFrame(draw);
  };
  const play = (clip) => {
    const audio = sound(clip);
    if (current && current !== clip) {
      const old = sound(current), keep = pair(current) === pair(clip) && !old.ended;
      old.pause();
      audio.currentTime = keep ? Math.min(old.currentTime, Math.max(0, (audio.duration || 0) - 0.05)) : 0;
      before = current;
    }
    current = clip;
    transport.hidden = false;
    now.textContent = `${clip.querySelector(".who").textContent} · ${pair(clip).querySelector("h3").firstChild.textContent.trim()}`;
    audio.loop = loop.checked;
    audio.play().then(draw, draw);
  };
  const press = (clip) => {
    if (clip === current && !sound(clip).paused) { sound(clip).pause(); draw(); } else play(clip);
  };
  const swap = () => { if (before) play(before); };
  for (const clip of clips) {
    const audio = sound(clip);
    audio.removeAttribute("controls");
    audio.addEventListener("ended", draw);
    clip.querySelector("button").addEventListener("click", () => press(clip));
  }
  toggle.addEventListener("click", () => { if (current) press(current); });
  document.querySelector("#switch").addEventListener("click", swap);
  loop.addEventListener("change", () => { if (current) sound(current).loop = loop.checked; });
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (!typing && !event.ctrlKey && !event.metaKey && !event.altKey && event.key.toLowerCase() === "x") swap();
  });
}
